"""Matrix products of groups of rows, each with the weight of its expert, in one launch.

A program finds the group its tile of rows belongs to from the sizes on the device, so nothing is read back to the host;
launches are sized for the most tiles there can be. Rows behind the last group are one more group, whose tiles are zero.

On Ascend: int8 products go to the cube unit only if the compiler takes int8 tl.dot, which we have not seen; a tile of
128 x 128 may have to shrink. Not run on Ascend.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from omni_kernels.backends.triton.language import dot, narrow, power_of_two

_SWIZZLE = tl.constexpr(8)
"""Row tiles whose programs follow each other for one column tile, to meet its weights in the cache."""


@triton.jit
def _tile_of_program(row_tiles, column_tiles):
    pid = tl.program_id(0)
    span = _SWIZZLE * column_tiles
    first = (pid // span) * _SWIZZLE
    height = tl.minimum(row_tiles - first, _SWIZZLE)
    return first + (pid % span) % height, (pid % span) // height


@triton.jit
def _rows_of_tile(group_sizes, tile, rows, num_groups, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """(group, first row, end of its rows) of a tile. Group num_groups is what lies behind; any later one is empty."""
    group = tl.arange(0, GROUPS)
    sizes = tl.load(group_sizes + group, mask=group < num_groups, other=0).to(tl.int32)
    sizes = tl.where(group == num_groups, rows - tl.sum(sizes, axis=0), sizes)
    tiles = (sizes + ROWS - 1) // ROWS
    mine = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    begin = tl.sum(tl.where(group < mine, sizes, 0), axis=0)
    end = tl.sum(tl.where(group <= mine, sizes, 0), axis=0)
    return mine, begin + (tile - tl.sum(tl.where(group < mine, tiles, 0), axis=0)) * ROWS, end


@triton.jit
def _multiply(
    x, row_scale, weight, column_scale, group_sizes, out, rows, depth, width, num_groups, row_tiles, column_tiles,
    weight_group, weight_row, weight_column,
    QUANT: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = _tile_of_program(row_tiles, column_tiles)
    group, first, end = _rows_of_tile(group_sizes, row_tile, rows, num_groups, ROWS, GROUPS)
    row = (first + tl.arange(0, ROWS)).to(tl.int64)
    column = (column_tile * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    k = tl.arange(0, DEPTH)
    is_row = row < end
    is_column = column < width
    expert = tl.minimum(group, num_groups - 1).to(tl.int64)
    x_at = x + row[:, None] * depth + k[None, :]
    weight_at = weight + expert * weight_group + k[:, None] * weight_row + column[None, :] * weight_column
    acc = tl.zeros((ROWS, COLUMNS), tl.int32 if QUANT else tl.float32)
    for start in range(0, tl.where(group < num_groups, depth, 0), DEPTH):
        is_k = start + k < depth
        a = tl.load(x_at + start, mask=is_row[:, None] & is_k[None, :], other=0)
        b = tl.load(weight_at + start * weight_row, mask=is_k[:, None] & is_column[None, :], other=0)
        acc = dot(a, b, acc)
    result = acc.to(tl.float32)
    if QUANT:
        result *= tl.load(row_scale + row, mask=is_row, other=0.0)[:, None]
        result *= tl.load(column_scale + expert * width + column, mask=is_column, other=0.0)[None, :]
    is_out = is_row[:, None] & is_column[None, :]
    tl.store(out + row[:, None] * width + column[None, :], narrow(result, out.dtype.element_ty), mask=is_out)


@triton.jit
def _multiply_int4(
    x, row_scale, weight, group_scale, group_sizes, out, rows, depth, half_width, num_groups, row_tiles, column_tiles,
    blocks, per_block,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Column c of the packed weight makes columns 2c and 2c + 1 of the result, from its low and its high half."""
    row_tile, column_tile = _tile_of_program(row_tiles, column_tiles)
    group, first, end = _rows_of_tile(group_sizes, row_tile, rows, num_groups, ROWS, GROUPS)
    row = (first + tl.arange(0, ROWS)).to(tl.int64)
    column = (column_tile * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    k = tl.arange(0, DEPTH)
    is_row = row < end
    is_column = column < half_width
    expert = tl.minimum(group, num_groups - 1).to(tl.int64)
    x_at = x + row[:, None] * depth + k[None, :]
    weight_at = weight + (expert * depth + k[:, None]) * half_width + column[None, :]
    scale_at = group_scale + expert * blocks * 2 * half_width + 2 * column
    low = tl.zeros((ROWS, COLUMNS), tl.float32)
    high = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(tl.where(group < num_groups, blocks, 0)):
        low_sum = tl.zeros((ROWS, COLUMNS), tl.int32)
        high_sum = tl.zeros((ROWS, COLUMNS), tl.int32)
        for start in range(0, per_block, DEPTH):
            at = block * per_block + start
            is_k = start + k < per_block
            a = tl.load(x_at + at, mask=is_row[:, None] & is_k[None, :], other=0)
            b = tl.load(weight_at + at * half_width, mask=is_k[:, None] & is_column[None, :], other=0).to(tl.int32)
            low_sum = dot(a, ((b << 28) >> 28).to(tl.int8), low_sum)
            high_sum = dot(a, (b >> 4).to(tl.int8), high_sum)
        scales = scale_at + block * 2 * half_width
        low += low_sum.to(tl.float32) * tl.load(scales, mask=is_column, other=0.0)[None, :]
        high += high_sum.to(tl.float32) * tl.load(scales + 1, mask=is_column, other=0.0)[None, :]
    scale = tl.load(row_scale + row, mask=is_row, other=0.0)[:, None]
    is_out = is_row[:, None] & is_column[None, :]
    out_at = out + row[:, None] * 2 * half_width + 2 * column[None, :]
    tl.store(out_at, narrow(low * scale, out.dtype.element_ty), mask=is_out)
    tl.store(out_at + 1, narrow(high * scale, out.dtype.element_ty), mask=is_out)


def _row_tiling(rows: int, groups: int) -> tuple[int, int]:
    """Rows of a tile, and the most tiles there can be: every group may end in one that is not full."""
    filled = min(rows, groups)
    height = min(power_of_two(rows // groups, 16), 128)
    return height, rows // height + filled + 1


def _product(
    x: Tensor, weight: Tensor, group_sizes: Tensor, out: Tensor, row_scale: Tensor | None, column_scale: Tensor | None
) -> Tensor:
    if len(x) == 0:
        return out
    groups, depth, width = weight.shape
    rows, row_tiles = _row_tiling(len(x), groups)
    columns, step = (64, 32) if x.element_size() == 4 else (128, 128 // x.element_size())
    column_tiles = triton.cdiv(width, columns)
    _multiply[(row_tiles * column_tiles,)](
        x, x if row_scale is None else row_scale, weight, x if column_scale is None else column_scale, group_sizes,
        out, len(x), depth, width, groups, row_tiles, column_tiles, *weight.stride(),
        QUANT=row_scale is not None, GROUPS=power_of_two(groups + 1), ROWS=rows, COLUMNS=columns, DEPTH=step,
        num_warps=8 if rows > 64 else 4, num_stages=3,
    )  # fmt: skip
    return out


def grouped_matmul(x: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    return _product(x, weight, group_sizes, x.new_empty(len(x), weight.shape[2]), None, None)


def grouped_matmul_w8a8(
    x: Tensor, row_scale: Tensor, weight: Tensor, column_scale: Tensor, group_sizes: Tensor, out_dtype: torch.dtype
) -> Tensor:
    out = torch.empty(len(x), weight.shape[2], dtype=out_dtype, device=x.device)
    return _product(x, weight, group_sizes, out, row_scale, column_scale)


def grouped_matmul_w4a8(
    x: Tensor, row_scale: Tensor, weight: Tensor, group_scale: Tensor, group_sizes: Tensor, out_dtype: torch.dtype
) -> Tensor:
    groups, depth, half_width = weight.shape
    out = torch.empty(len(x), 2 * half_width, dtype=out_dtype, device=x.device)
    if len(x) == 0:
        return out
    rows, row_tiles = _row_tiling(len(x), groups)
    column_tiles = triton.cdiv(half_width, 64)
    blocks = group_scale.shape[1]
    per_block = depth // blocks
    _multiply_int4[(row_tiles * column_tiles,)](
        x, row_scale, weight, group_scale, group_sizes, out, len(x), depth, half_width, groups, row_tiles,
        column_tiles, blocks, per_block,
        GROUPS=power_of_two(groups + 1), ROWS=rows, COLUMNS=64, DEPTH=min(power_of_two(per_block, 32), 128),
        num_warps=8 if rows > 64 else 4, num_stages=3,
    )  # fmt: skip
    return out


KERNELS: Mapping[str, Callable[..., Any]] = {
    "grouped_matmul": grouped_matmul,
    "grouped_matmul_w8a8": grouped_matmul_w8a8,
    "grouped_matmul_w4a8": grouped_matmul_w4a8,
}
