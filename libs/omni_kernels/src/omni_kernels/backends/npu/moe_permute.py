"""Tokens to their experts' rows and back on Ascend."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch_npu
from torch import Tensor

from omni_kernels.checks import in_range


def permute(x: Tensor, slots: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of other ranks count as one more expert behind the last: what is out of range the call leaves undefined.

    Takes up to 10239 slots.
    """
    in_range("num_slots", num_slots, 1, 10239)
    pairs = slots.numel()
    if pairs == 0:
        return x.new_empty(0, x.shape[1]), slots.new_empty(0), slots.new_zeros(num_slots, dtype=torch.int64)
    local = (slots >= 0) & (slots < num_slots)
    rows, source, sizes, _ = torch_npu.npu_moe_init_routing_v2(
        x,
        torch.where(local, slots, num_slots).int(),
        active_num=pairs,
        expert_num=num_slots + 1,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        quant_mode=-1,
        active_expert_range=[0, num_slots + 1],
        row_idx_type=1,
    )
    behind = torch.arange(pairs, device=x.device) >= pairs - sizes[num_slots]
    return rows.masked_fill(behind.unsqueeze(1), 0), source, sizes[:num_slots]


def combine(rows: Tensor, source: Tensor, weights: Tensor, residual: Tensor | None) -> Tensor:
    """The call takes weights in the dtype of `rows` only, and a residual only with a second one."""
    tokens, top_k = weights.shape
    if tokens == 0:
        return rows.new_empty(0, rows.shape[1])
    pair = source.long()
    down_columns = pair % top_k * tokens + pair // top_k
    position = torch.empty_like(source)
    position[down_columns] = torch.arange(len(source), dtype=torch.int32, device=source.device)
    second = None if residual is None else torch.zeros_like(residual)
    combined: Tensor = torch_npu.npu_moe_finalize_routing(
        rows, residual, second, None, weights.to(rows.dtype), position, None, drop_pad_mode=0
    )
    return combined


KERNELS: Mapping[str, Callable[..., Any]] = {"moe_permute": permute, "moe_combine": combine}
