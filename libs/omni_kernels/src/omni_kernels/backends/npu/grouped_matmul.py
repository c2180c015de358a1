"""Grouped matrix products on Ascend. The calls leave rows behind the last group undefined; here they come out zero."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch_npu
from torch import Tensor

from omni_kernels.checks import in_range, refuse
from omni_kernels.ops.grouped_matmul import unpack_int4

_INNER_LIMIT = 65535
"""Greatest last dimension of x and of a weight."""


def _grouped_matmul(x: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    """Takes up to 1024 groups, and dimensions up to 65535."""
    return product(x, weight, group_sizes)


def _grouped_matmul_w8a8(
    x: Tensor, row_scale: Tensor, weight: Tensor, column_scale: Tensor, group_sizes: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """As above. The call takes column scales in bfloat16 for bfloat16 results, in float32 for float16 ones.

    Results in float32 are scaled from the integer product.
    """
    if out_dtype is torch.float32:
        exact = product(x, weight, group_sizes, output_dtype=torch.int32).float()
        ends = group_sizes.cumsum(0)
        group = torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True)
        return exact * row_scale.unsqueeze(1) * column_scale[group.clamp(max=len(ends) - 1)]
    scale = column_scale.bfloat16() if out_dtype is torch.bfloat16 else column_scale
    return product(x, weight, group_sizes, scale=[scale], per_token_scale=[row_scale], output_dtype=out_dtype)


def _grouped_matmul_w4a8(
    x: Tensor, row_scale: Tensor, weight: Tensor, group_scale: Tensor, group_sizes: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """As above, with multiples of 8 columns.

    The wheels document 4-bit weights beside floating inputs, not beside int8: the integers of x, all exact in the
    result's dtype, are multiplied in it, with group scales in it, and the row scale is applied behind.
    Results in float32 are made from weights unpacked to float32.
    """
    if group_scale.shape[2] % 8:
        refuse("group_scale", "npu takes multiples of 8 columns", group_scale.shape[2])
    if out_dtype is torch.float32:
        codes = unpack_int4(weight).unflatten(1, (group_scale.shape[1], -1)).float()
        unscaled = product(x.float(), (codes * group_scale.unsqueeze(2)).flatten(1, 2), group_sizes)
    else:
        scale = group_scale.to(out_dtype)
        packed = weight.view(torch.int32)  # eight int4 each, the first in the lowest bits
        offset = torch.zeros_like(scale)
        unscaled = product(x.to(out_dtype), packed, group_sizes, antiquant_scale=[scale], antiquant_offset=[offset])
    return (unscaled.float() * row_scale.unsqueeze(1)).to(out_dtype)


def product(
    x: Tensor,
    weight: Tensor,
    group_sizes: Tensor,
    *,
    scale: list[Tensor] | None = None,
    per_token_scale: list[Tensor] | None = None,
    antiquant_scale: list[Tensor] | None = None,
    antiquant_offset: list[Tensor] | None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    in_range("group_sizes", len(weight), 1, 1024)
    in_range("x", x.shape[1], 1, _INNER_LIMIT)
    in_range("weight", weight.shape[2], 1, _INNER_LIMIT)
    counts_rows = len(weight) > 1  # of one group the call takes the running total, which is the same
    (result,) = torch_npu.npu_grouped_matmul(
        [x],
        [weight],
        group_list=group_sizes,
        group_list_type=1 if counts_rows else 0,
        group_type=0,
        split_item=2,
        scale=scale,
        per_token_scale=per_token_scale,
        antiquant_scale=antiquant_scale,
        antiquant_offset=antiquant_offset,
        output_dtype=output_dtype,
    )
    behind = torch.arange(len(x), device=x.device) >= group_sizes.sum()
    return torch.masked_fill(result, behind.unsqueeze(1), 0)


KERNELS: Mapping[str, Callable[..., Any]] = {
    "grouped_matmul": _grouped_matmul,
    "grouped_matmul_w8a8": _grouped_matmul_w8a8,
    "grouped_matmul_w4a8": _grouped_matmul_w4a8,
}
