"""Gated activation on Ascend."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch_npu
from torch import Tensor

from omni_kernels.ops.swiglu import DEQUANT_SWIGLU_QUANT, SWIGLU_QUANT

MAX_FUSED_COLUMNS = 8192
"""Of gate and up together, in npu_swiglu_quant."""
MAX_DEQUANT_COLUMNS, DEQUANT_ALIGNMENT = 10496, 64
"""Of the result, in npu_dequant_swiglu_quant with groups."""


def _swiglu(gate_up: Tensor) -> Tensor:
    activated: Tensor = torch_npu.npu_swiglu(gate_up, dim=-1)
    return activated


def _swiglu_quant(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Rows too wide for the fused call run as the meaning: swiglu alone would round them before quantization."""
    if gate_up.shape[-1] > MAX_FUSED_COLUMNS:
        return SWIGLU_QUANT.meaning(gate_up)
    q, scale = torch_npu.npu_swiglu_quant(gate_up, activate_left=True, quant_mode=1, dst_type=torch.int8)
    return q, scale


def _dequant_swiglu_quant(
    acc: Tensor, row_scale: Tensor, column_scale: Tensor, group_sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """Sizes that the fused call refuses run as the meaning. It leaves rows past the groups as they were in memory."""
    columns = acc.shape[1] // 2
    if columns > MAX_DEQUANT_COLUMNS or columns % DEQUANT_ALIGNMENT:
        return DEQUANT_SWIGLU_QUANT.meaning(acc, row_scale, column_scale, group_sizes)
    q, scale = torch_npu.npu_dequant_swiglu_quant(
        acc,
        weight_scale=column_scale,
        activation_scale=row_scale,
        group_index=group_sizes,
        activate_left=True,
        quant_mode=1,
    )
    past = torch.arange(acc.shape[0], device=acc.device) >= group_sizes.sum()
    return q.masked_fill(past.unsqueeze(-1), 0), scale.masked_fill(past, 0)


KERNELS: Mapping[str, Callable[..., Any]] = {
    "swiglu": _swiglu,
    "swiglu_quant": _swiglu_quant,
    "dequant_swiglu_quant": _dequant_swiglu_quant,
}
