"""Attention on our ops: vLLM's CPU backends are replaced under their own names, by vLLM's registry.

Blocks are written otherwise than vLLM's CPU kernels write them. The backend has a name of its own, by which the KV
connector tells that an engine with it and one without cannot pull each other's blocks. Latent attention keeps vLLM's
form of a block.
"""

import importlib
from typing import Any

_HERE = "omni_kernels.vllm.attention_backends"
PATHS = {
    "OMNI": f"{_HERE}.OmniBackend",
    "CPU_ATTN": f"{_HERE}.OmniBackend",
    "CPU_MLA": f"{_HERE}.OmniLatentBackend",
    "AMX_MLA": f"{_HERE}.OmniLatentBackend",
}


def register_attention(platform: str) -> None:
    registry: Any = importlib.import_module("vllm.v1.attention.backends.registry")
    for name, path in PATHS.items():
        registry.register_backend(getattr(registry.AttentionBackendEnum, name, name), path)
