"""RMS norms by vLLM's IR-op registry, as provider "omni"; the engine argument `ir_op_priority` puts it first.

On the out-of-tree twin the norm layer itself is replaced too, as out-of-tree platforms do it.
"""

import importlib
from typing import Any

from torch import Tensor

from omni_kernels.ops import OPS
from omni_kernels.vllm.bound import bound

PROVIDER = "omni"

_RMS_NORM = bound(OPS["rms_norm"])
_ADD_RMS_NORM = bound(OPS["add_rms_norm"])


def register_norms(platform: str) -> None:
    ops = importlib.import_module("vllm.ir").ops
    if PROVIDER not in ops.rms_norm.impls:
        ops.rms_norm.register_impl(PROVIDER, supports_args=_is_plain)(_rms_norm)
        ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_is_plain_add)(_fused_add_rms_norm)
    if platform == "twin":
        _replace_layer()


def _is_plain(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return variance_size is None and weight is not None and weight.dtype == x.dtype


def _is_plain_add(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return variance_size is None and weight is not None and weight.dtype == x.dtype == x_residual.dtype


def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    normed: Tensor = _RMS_NORM(x, weight, epsilon)
    return normed


def _fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    normed: tuple[Tensor, Tensor] = _ADD_RMS_NORM(x, x_residual, weight, epsilon)
    return normed


def _replace_layer() -> None:
    layer: Any = importlib.import_module("vllm.model_executor.layers.layernorm").RMSNorm

    @layer.register_oot(name="RMSNorm")
    class TwinRMSNorm(layer):  # type: ignore[misc]
        @classmethod
        def enabled(cls) -> bool:
            """Also where a compiled model has vLLM's custom ops switched off."""
            return True

        def forward_oot(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
            if not self.has_weight or self.variance_size_override is not None:
                plain: Tensor | tuple[Tensor, Tensor] = self.forward_native(x, residual)
                return plain
            if residual is None:
                return _rms_norm(x, self.weight.data, self.variance_epsilon)
            return _fused_add_rms_norm(x, residual, self.weight.data, self.variance_epsilon)
