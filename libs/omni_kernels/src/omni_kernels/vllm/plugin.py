"""vLLM's `general_plugins` hook: puts the parts that the environment names onto Omni's ops, in this process.

vLLM calls it in each of its processes, perhaps more than once. What is done to vLLM is booked in `UPSTREAM.md` of
libs/engine. Beside vllm-ascend nothing is registered under a name that vllm-ascend registers: it asserts on duplicates.
"""

import importlib
import os
from typing import Any

from omni_kernels.vllm.parts import BACKENDS, KERNELS_VARIABLE, PARTS, PLATFORM_VARIABLE

_WHERE = {
    "norms": "norms",
    "routing": "moe",
    "experts": "moe",
    "attention": "attention",
    "rotary": "layers",
    "activation": "layers",
}
_registered: set[str] = set()


def register() -> None:
    """Called by vLLM. Raises RuntimeError, in workers, where the platform's backend cannot be loaded."""
    parts = [part for part in os.environ.get(KERNELS_VARIABLE, "").split(",") if part]
    if not parts or _registered.issuperset(parts):
        return
    platform = os.environ[PLATFORM_VARIABLE]
    _load_in_workers(BACKENDS[platform])
    for part in PARTS:
        if part in parts and part not in _registered:
            module = importlib.import_module(f"omni_kernels.vllm.{_WHERE[part]}")
            getattr(module, f"register_{part}")(platform)
            _registered.add(part)


def _load_in_workers(backend: str) -> None:
    """Load the backend's kernels behind the last thing that a worker does before it makes its model.

    There vLLM looks at every object of every module imported so far, and fails at some that numba brings.
    """
    current: Any = importlib.import_module("vllm.platforms").current_platform
    before = current.register_triton_kernel_overrides

    def load_then() -> None:
        before()
        importlib.import_module("omni_kernels.vllm.usage").load_counted(backend)

    current.register_triton_kernel_overrides = load_then
