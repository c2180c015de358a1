"""Dynamic quantization on Ascend."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch_npu
from torch import Tensor

from omni_kernels.ops.quant import DYNAMIC_QUANT


def _dynamic_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """The call takes half precision only; float32 runs as the meaning."""
    if x.dtype is torch.float32:
        return DYNAMIC_QUANT.meaning(x)
    q, scale = torch_npu.npu_dynamic_quant(x)
    return q, scale


KERNELS: Mapping[str, Callable[..., Any]] = {"dynamic_quant": _dynamic_quant}
