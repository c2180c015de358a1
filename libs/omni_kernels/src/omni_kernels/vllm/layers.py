"""Rotary embeddings and SwiGLU as out-of-tree layers. Not beside vllm-ascend, which has layers of these names."""

import importlib
from typing import Any

from torch import Tensor

from omni_kernels.ops import OPS
from omni_kernels.vllm.bound import bound

_ROTARY = bound(OPS["rotary"])
_SWIGLU = bound(OPS["swiglu"])


def register_rotary(platform: str) -> None:
    layer: Any = importlib.import_module("vllm.model_executor.layers.rotary_embedding.base").RotaryEmbedding

    @layer.register_oot(name="RotaryEmbedding")
    class OmniRotaryEmbedding(layer):  # type: ignore[misc]
        @classmethod
        def enabled(cls) -> bool:
            """Also where a compiled model has vLLM's custom ops switched off."""
            return True

        def forward_oot(
            self, positions: Tensor, query: Tensor, key: Tensor | None = None
        ) -> tuple[Tensor, Tensor | None]:
            cos_sin = self._match_cos_sin_cache_dtype(query).index_select(0, positions.flatten())
            cos, sin = (half.contiguous() for half in cos_sin.chunk(2, dim=-1))

            def rotated(x: Tensor) -> Tensor:
                heads = x.reshape(len(cos), -1, self.head_size)
                turned: Tensor = _ROTARY(heads, cos, sin, not self.is_neox_style)
                return turned.view(x.shape)

            return rotated(query), None if key is None else rotated(key)

        def forward_cpu(
            self, positions: Tensor, query: Tensor, key: Tensor | None = None
        ) -> tuple[Tensor, Tensor | None]:
            return self.forward_oot(positions, query, key)


def register_activation(platform: str) -> None:
    layer: Any = importlib.import_module("vllm.model_executor.layers.activation").SiluAndMul

    @layer.register_oot(name="SiluAndMul")
    class OmniSiluAndMul(layer):  # type: ignore[misc]
        @classmethod
        def enabled(cls) -> bool:
            return True

        def forward_oot(self, x: Tensor) -> Tensor:
            gated: Tensor = _SWIGLU(x)
            return gated

        def forward_cpu(self, x: Tensor) -> Tensor:
            return self.forward_oot(x)
