"""Grouped matrix products through oneDNN, one call for each group that has rows; groups of few rows in a compiled loop.

oneDNN lays a weight out anew in every call, which costs more than a product of few rows does.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from omni_kernels.backends.cpu.compiled import as_float, pointer
from omni_kernels.backends.cpu.rows import load, loop, store
from omni_kernels.ops.grouped_matmul import GROUPED_MATMUL_W8A8, groups

_BYTE, _FLOAT, _WORD, _HALF, _LONG = np.int8, np.float32, np.int32, np.uint16, np.int64


def few_rows(dtype: torch.dtype, depth: int, columns: int) -> int:
    """Up to how many rows the compiled loop, on one core, is faster than oneDNN on one or two."""
    return min(32, max(1, (1 << 22) // (depth * columns))) if dtype is torch.bfloat16 else 0


@loop
def dot(x: Any, stored: Any) -> Any:
    """Of float32 and bfloat16 as it is stored."""
    total = _FLOAT(0)
    for k in range(len(x)):
        total += x[k] * as_float(_WORD(stored[k]) << _WORD(16))
    return total


@loop
def _few_rows(x_at: int, weight_at: int, sizes_at: int, y_at: int, shape: tuple[int, int, int, int], most: int) -> None:
    """The products of groups of up to `most` rows, in bfloat16. `shape`: N, E, K, M; weights lie as (E, M, K)."""
    _, num_groups, depth, columns = shape
    weight = numba.carray(pointer(weight_at, _HALF), (num_groups, columns, depth))
    sizes = numba.carray(pointer(sizes_at, _LONG), (num_groups,))
    x = np.empty(depth, _FLOAT)
    y = np.empty(columns, _FLOAT)
    start = 0
    for group in range(num_groups):
        size = sizes[group]
        if size <= most:
            for row in range(start, start + size):
                load(x_at + 2 * depth * row, x, True)
                for column in range(columns):
                    y[column] = dot(x, weight[group, column])
                store(y, y_at + 2 * columns * row, True)
        start += size


def _grouped_matmul(x: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    """Fastest with weights that lie transposed, as checkpoints store them."""
    depth, columns = weight.shape[1:]
    y = x.new_empty(len(x), columns)
    most = few_rows(x.dtype, depth, columns) if weight.stride(1) == 1 else 0
    end = 0
    has_few = False
    for group, rows in groups(x, group_sizes):
        if rows.stop - rows.start > most:
            torch.mm(x[rows], weight[group], out=y[rows])
        else:
            has_few = True
        end = rows.stop
    if has_few:
        shape = (len(x), len(weight), depth, columns)
        _few_rows(x.data_ptr(), weight.data_ptr(), group_sizes.data_ptr(), y.data_ptr(), shape, most)
    y[end:] = 0
    return y


def _grouped_matmul_w8a8(
    x: Tensor, row_scale: Tensor, weight: Tensor, column_scale: Tensor, group_sizes: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """Rows of one element run as the meaning: torch's integer product reads beside them."""
    if x.shape[1] == 1:
        return GROUPED_MATMUL_W8A8.meaning(x, row_scale, weight, column_scale, group_sizes, out_dtype)
    y = x.new_empty(len(x), weight.shape[2], dtype=out_dtype)
    scales = row_scale.unsqueeze(1)
    end = 0
    for group, rows in groups(x, group_sizes):
        product = torch._int_mm(x[rows], weight[group])
        y[rows] = product.float().mul_(column_scale[group]).mul_(scales[rows])
        end = rows.stop
    y[end:] = 0
    return y


@loop
def _dequantize(
    codes_at: int, scale_at: int, out_at: int, depth: int, columns: int, blocks: int, is_half: bool
) -> None:
    """Fill out (depth, columns), float32 or (`is_half`) bfloat16, from codes and scales as the op has them."""
    codes = numba.carray(pointer(codes_at, _BYTE), (depth, columns // 2))
    scale = numba.carray(pointer(scale_at, _FLOAT), (blocks, columns))
    row = np.empty(columns, _FLOAT)
    for k in range(depth):
        factor = scale[k // (depth // blocks)]
        for pair in range(columns // 2):
            byte = _WORD(codes[k, pair])
            row[2 * pair] = _FLOAT(((byte & 15) ^ 8) - 8) * factor[2 * pair]
            row[2 * pair + 1] = _FLOAT(byte >> 4) * factor[2 * pair + 1]
        store(row, out_at + (2 if is_half else 4) * columns * k, is_half)


def _grouped_matmul_w4a8(
    x: Tensor, row_scale: Tensor, weight: Tensor, group_scale: Tensor, group_sizes: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """Weights of a group are unpacked to bfloat16 for results in bfloat16, in which the integers of x are exact;
    to float32 for others.
    """
    _, blocks, columns = group_scale.shape
    depth = x.shape[1]
    is_half = out_dtype is torch.bfloat16
    matrix = torch.empty(depth, columns, dtype=torch.bfloat16 if is_half else torch.float32)
    y = x.new_empty(len(x), columns, dtype=out_dtype)
    end = 0
    for group, rows in groups(x, group_sizes):
        codes_at, scale_at = weight[group].data_ptr(), group_scale[group].data_ptr()
        _dequantize(codes_at, scale_at, matrix.data_ptr(), depth, columns, blocks, is_half)
        y[rows] = torch.mm(x[rows].to(matrix.dtype), matrix).mul_(row_scale[rows].unsqueeze(1))
        end = rows.stop
    y[end:] = 0
    return y


KERNELS: Mapping[str, Callable[..., Any]] = {
    "grouped_matmul": _grouped_matmul,
    "grouped_matmul_w8a8": _grouped_matmul_w8a8,
    "grouped_matmul_w4a8": _grouped_matmul_w4a8,
}
