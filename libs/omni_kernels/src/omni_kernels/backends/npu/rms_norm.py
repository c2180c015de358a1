"""Root-mean-square normalisation on Ascend."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch_npu
from torch import Tensor

from omni_kernels.ops.rms_norm import ADD_RMS_NORM_QUANT


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed: Tensor = torch_npu.npu_rms_norm(x.contiguous(), weight, eps)[0]
    return normed


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, _, total = torch_npu.npu_add_rms_norm(x, residual, weight, eps)
    return normed, total


def _rms_norm_quant(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """With a residual of zeros: no call takes one tensor, and two calls would round to half precision between them."""
    q, scale, _ = _add_rms_norm_quant(x, torch.zeros_like(x), weight, eps)
    return q, scale


def _add_rms_norm_quant(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The fused call takes half precision only, and at least one element; other inputs run as the meaning."""
    if x.dtype is torch.float32 or x.numel() == 0:
        return ADD_RMS_NORM_QUANT.meaning(x, residual, weight, eps)
    q, _, total, scale, _ = torch_npu.npu_add_rms_norm_dynamic_quant(x, residual, weight, epsilon=eps)
    return q, scale, total


KERNELS: Mapping[str, Callable[..., Any]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rms_norm_quant": _rms_norm_quant,
    "add_rms_norm_quant": _add_rms_norm_quant,
}
