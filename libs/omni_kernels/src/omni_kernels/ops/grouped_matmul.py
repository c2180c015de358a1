"""Matrix products of consecutive groups of rows, each group with the weight of its expert: bf16, W8A8 and W4A8."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, device

from omni_kernels.case import DEEPSEEK_V3, PANGU_ULTRA_MOE, QWEN3_MOE, TINY, Case, ModelShape, declare, dtype_name
from omni_kernels.checks import (
    FLOATS,
    has_dims,
    has_dtype,
    has_shape,
    is_contiguous,
    is_one_of,
    on_device_of,
    refuse,
    wide,
)

_TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (1e-2, 1.6e-2), torch.float16: (2e-3, 2e-3)}


def _grouped_matmul(x: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    """x (N, K) times weight (E, K, M) of each row's group: (N, M), in the dtype of `x`.

    The first group_sizes[0] rows are of group 0, the next group_sizes[1] of group 1, and so on; group_sizes is
    int64 (E,). Rows behind the last group come out zero. `weight` may be a view with its last two dimensions
    transposed, as checkpoints store it. Adds in float32.
    """
    y = x.new_zeros(len(x), weight.shape[2])
    for group, rows in groups(x, group_sizes):
        y[rows] = (wide(x[rows]) @ wide(weight[group])).to(x.dtype)
    return y


def _grouped_matmul_w8a8(
    x: Tensor, row_scale: Tensor, weight: Tensor, column_scale: Tensor, group_sizes: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """As `grouped_matmul` of x int8 (N, K) * row_scale and weight int8 (E, K, M) * column_scale: (N, M) in `out_dtype`.

    Scales are float32, row_scale (N,) and column_scale (E, M). The product of the integers is exact.
    """
    y = x.new_zeros(len(x), weight.shape[2], dtype=out_dtype)
    for group, rows in groups(x, group_sizes):
        product = (x[rows].double() @ weight[group].double()).to(row_scale.dtype)
        y[rows] = (product * row_scale[rows].unsqueeze(1) * column_scale[group]).to(out_dtype)
    return y


def _grouped_matmul_w4a8(
    x: Tensor, row_scale: Tensor, weight: Tensor, group_scale: Tensor, group_sizes: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """As `grouped_matmul_w8a8` with weights of 4 bits, -8 .. 7, and a scale for every K / G rows of a column.

    weight is int8 (E, K, M / 2), two columns to a byte, the even one in the low half; group_scale float32 (E, G, M).
    """
    y = x.new_zeros(len(x), group_scale.shape[2], dtype=out_dtype)
    blocks = group_scale.shape[1]
    for group, rows in groups(x, group_sizes):
        codes = unpack_int4(weight[group]).unflatten(0, (blocks, -1)).to(row_scale.dtype)
        matrix = (codes * group_scale[group].unsqueeze(1)).flatten(0, 1)
        y[rows] = (x[rows].to(row_scale.dtype) @ matrix * row_scale[rows].unsqueeze(1)).to(out_dtype)
    return y


def unpack_int4(packed: Tensor) -> Tensor:
    """Values -8 .. 7 as int8 (..., 2n) of int8 (..., n) that holds two each, the low half first."""
    return torch.stack([(packed << 4) >> 4, packed >> 4], dim=-1).flatten(-2)


def pack_int4(values: Tensor) -> Tensor:
    """The inverse of `unpack_int4`. `values` int8 (..., 2n) are from -8 to 7."""
    return (values[..., ::2] & 15) | (values[..., 1::2] << 4)


def groups(x: Tensor, group_sizes: Tensor) -> Iterator[tuple[int, slice]]:
    """The groups that have rows, and which. Reads `group_sizes` on the host.

    Raises ValueError when a size is negative, or they ask for more rows than there are.
    """
    start = 0
    for group, size in enumerate(group_sizes.tolist()):
        if size < 0 or start + size > len(x):
            refuse("group_sizes", f"must not be negative, nor add up to more than the {len(x)} rows of x", size)
        if size:
            yield group, slice(start, start + size)
        start += size


def _fake(x: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


def _fake_quantized(
    x: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, group_sizes: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape[0], scale.shape[-1], dtype=out_dtype)


def _check(x: Tensor, weight: Tensor, group_sizes: Tensor) -> None:
    has_dims("x", x, 2)
    has_dtype("x", x, *FLOATS)
    is_contiguous("x", x)
    has_dtype("weight", weight, x.dtype)
    _check_weight(x, weight, x.shape[1])
    if not weight.is_contiguous() and not weight.transpose(1, 2).is_contiguous():
        refuse("weight", "each matrix must be contiguous, or transposed and contiguous", f"strides {weight.stride()}")
    _check_group_sizes(x, weight, group_sizes)


def _check_w8a8(
    x: Tensor, row_scale: Tensor, weight: Tensor, column_scale: Tensor, group_sizes: Tensor, out_dtype: torch.dtype
) -> None:
    _check_quantized(x, row_scale, weight, group_sizes, out_dtype)
    if not weight.is_contiguous() and not weight.transpose(1, 2).is_contiguous():
        refuse("weight", "each matrix must be contiguous, or transposed and contiguous", f"strides {weight.stride()}")
    has_dtype("column_scale", column_scale, torch.float32)
    has_shape("column_scale", column_scale, (weight.shape[0], weight.shape[2]))
    is_contiguous("column_scale", column_scale)
    on_device_of("column_scale", column_scale, x)


def _check_w4a8(
    x: Tensor, row_scale: Tensor, weight: Tensor, group_scale: Tensor, group_sizes: Tensor, out_dtype: torch.dtype
) -> None:
    _check_quantized(x, row_scale, weight, group_sizes, out_dtype)
    is_contiguous("weight", weight)
    has_dtype("group_scale", group_scale, torch.float32)
    has_shape("group_scale", group_scale, (weight.shape[0], -1, 2 * weight.shape[2]))
    is_contiguous("group_scale", group_scale)
    on_device_of("group_scale", group_scale, x)
    blocks = group_scale.shape[1]
    if blocks == 0 or x.shape[1] % blocks:
        refuse("group_scale", f"its second size must divide the {x.shape[1]} rows of a weight", blocks)


def _check_quantized(x: Tensor, row_scale: Tensor, weight: Tensor, group_sizes: Tensor, out_dtype: torch.dtype) -> None:
    has_dims("x", x, 2)
    has_dtype("x", x, torch.int8)
    is_contiguous("x", x)
    has_dtype("row_scale", row_scale, torch.float32)
    has_shape("row_scale", row_scale, (x.shape[0],))
    is_contiguous("row_scale", row_scale)
    on_device_of("row_scale", row_scale, x)
    has_dtype("weight", weight, torch.int8)
    _check_weight(x, weight, x.shape[1])
    _check_group_sizes(x, weight, group_sizes)
    is_one_of("out_dtype", out_dtype, FLOATS)


def _check_weight(x: Tensor, weight: Tensor, rows: int) -> None:
    has_shape("weight", weight, (-1, rows, -1))
    if 0 in weight.shape:
        refuse("weight", "must not be empty", tuple(weight.shape))
    on_device_of("weight", weight, x)


def _check_group_sizes(x: Tensor, weight: Tensor, group_sizes: Tensor) -> None:
    has_dtype("group_sizes", group_sizes, torch.int64)
    has_shape("group_sizes", group_sizes, (weight.shape[0],))
    is_contiguous("group_sizes", group_sizes)
    on_device_of("group_sizes", group_sizes, x)


# (model, groups: some of its experts, K, M: a part of the columns where all would take long, rows, sizes)
_SHAPES: tuple[tuple[ModelShape, int, int, tuple[int, ...], int], ...] = (
    (TINY, TINY.hidden, 2 * TINY.intermediate, (3, 0, 5, 1, 0, 0, 2, 1), 0),
    (TINY, TINY.intermediate, TINY.hidden, (4,), 3),
    (QWEN3_MOE, QWEN3_MOE.hidden, 256, (1, 0, 17, 0), 2),
    (DEEPSEEK_V3, DEEPSEEK_V3.hidden, 128, (0, 2, 5), 1),
    (PANGU_ULTRA_MOE, PANGU_ULTRA_MOE.intermediate, 192, (1, 1), 0),
    (TINY, TINY.hidden, 32, (0, 0), 4),
    (TINY, TINY.hidden, 32, (0, 0), 0),
)


def _samples(where: device) -> Iterator[Case]:
    generator = torch.Generator(device="cpu").manual_seed(0)
    for model, depth, columns, sizes, behind in _SHAPES:
        for dtype in FLOATS if model is TINY else (torch.float32, torch.bfloat16):
            x = torch.randn(sum(sizes) + behind, depth, generator=generator).to(where, dtype)
            weight = torch.randn(len(sizes), columns, depth, generator=generator).div_(depth**0.5).to(where, dtype)
            matrix = weight.transpose(1, 2) if dtype is torch.bfloat16 else weight.transpose(1, 2).contiguous()
            name = f"grouped_matmul-{model.name}-{len(x)}x{depth}x{columns}-{dtype_name(dtype)}"
            yield Case(name, (x, matrix, torch.tensor(sizes, device=where)), *_TOLERANCE[dtype])


def _quantized_samples(where: device, bits: int) -> Iterator[Case]:
    generator = torch.Generator(device="cpu").manual_seed(bits)
    for model, depth, columns, sizes, behind in _SHAPES:
        for dtype in FLOATS if model is TINY else (torch.bfloat16,):
            rows = sum(sizes) + behind
            x = torch.randint(-127, 128, (rows, depth), generator=generator, dtype=torch.int8).to(where)
            row_scale = (torch.rand(rows, generator=generator) / 60).to(where)
            high = 2 ** (bits - 1)
            weight = torch.randint(1 - high, high, (len(sizes), depth, columns), generator=generator, dtype=torch.int8)
            blocks = () if bits == 8 else (depth // 32,)
            scale = torch.rand(len(sizes), *blocks, columns, generator=generator) / (high * depth**0.5)
            stored = weight if bits == 8 else pack_int4(weight)
            name = f"grouped_matmul_w{bits}a8-{model.name}-{rows}x{depth}x{columns}-{dtype_name(dtype)}"
            group_sizes = torch.tensor(sizes, device=where)
            inputs = (x, row_scale, stored.to(where), scale.to(where), group_sizes, dtype)
            yield Case(name, inputs, *_TOLERANCE[dtype])


GROUPED_MATMUL = declare("grouped_matmul", _grouped_matmul, _fake, _check, _samples)
GROUPED_MATMUL_W8A8 = declare(
    "grouped_matmul_w8a8", _grouped_matmul_w8a8, _fake_quantized, _check_w8a8, partial(_quantized_samples, bits=8)
)
GROUPED_MATMUL_W4A8 = declare(
    "grouped_matmul_w4a8", _grouped_matmul_w4a8, _fake_quantized, _check_w4a8, partial(_quantized_samples, bits=4)
)
grouped_matmul = GROUPED_MATMUL.call
grouped_matmul_w8a8 = GROUPED_MATMUL_W8A8.call
grouped_matmul_w4a8 = GROUPED_MATMUL_W4A8.call

OPS = (GROUPED_MATMUL, GROUPED_MATMUL_W8A8, GROUPED_MATMUL_W4A8)
