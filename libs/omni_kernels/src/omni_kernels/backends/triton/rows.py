"""Ops on single rows: normalisation, gated activation, and dynamic int8 quantization alone or behind either.

A program holds a whole row on chip, so each op reads its input once and writes its result once.

On Ascend: a row of 8192 float32 values and two more like it must fit the vector buffer (192 KiB); rounding relies on
float32 additions being kept as written. Not run on Ascend.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from omni_kernels.backends.triton.language import narrow, nearest, power_of_two, programs, warps


@triton.jit
def _store_quantized(y, is_column, q, scales, row, width, columns):
    """Row `row` of `y`, 0 outside of `is_column`, as int8 and its scale."""
    scale = tl.max(tl.abs(y), axis=0) / 127.0
    quantized = nearest(tl.div_rn(y, tl.where(scale == 0.0, 1.0, scale)))
    tl.store(q + row * width + columns, quantized.to(tl.int8), mask=is_column)
    tl.store(scales + row, scale)


@triton.jit
def _norm(
    x, residual, weight, out, scales, total, rows, width, x_row, eps,
    ADD: tl.constexpr, QUANT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    is_column = columns < width
    scale = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        y = tl.load(x + row * x_row + columns, mask=is_column, other=0.0).to(tl.float32)
        if ADD:
            y += tl.load(residual + row * width + columns, mask=is_column, other=0.0).to(tl.float32)
            tl.store(total + row * width + columns, narrow(y, total.dtype.element_ty), mask=is_column)
        y = y * (1.0 / tl.sqrt_rn(tl.sum(y * y, axis=0) / width + eps)) * scale
        if QUANT:
            _store_quantized(y, is_column, out, scales, row, width, columns)
        else:
            tl.store(out + row * width + columns, narrow(y, out.dtype.element_ty), mask=is_column)


@triton.jit
def _activate(gate_up, out, scales, rows, width, QUANT: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    is_column = columns < width
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        gate = tl.load(gate_up + row * 2 * width + columns, mask=is_column, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * width + width + columns, mask=is_column, other=0.0).to(tl.float32)
        y = gate / (1.0 + tl.exp(-gate)) * up
        if QUANT:
            _store_quantized(y, is_column, out, scales, row, width, columns)
        else:
            tl.store(out + row * width + columns, narrow(y, out.dtype.element_ty), mask=is_column)


@triton.jit
def _dequantize_activate(
    acc, row_scale, column_scale, group_sizes, q, scales, rows, width, num_groups,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    group = tl.arange(0, GROUPS)
    ends = tl.cumsum(tl.load(group_sizes + group, mask=group < num_groups, other=0), axis=0)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        expert = tl.sum(((ends <= row) & (group < num_groups)).to(tl.int32), axis=0)
        is_column = columns < tl.where(expert < num_groups, width, 0)  # rows behind the last group: nothing
        scale = tl.load(row_scale + row)
        gate = tl.load(acc + row * 2 * width + columns, mask=is_column, other=0).to(tl.float32) * scale
        up = tl.load(acc + row * 2 * width + width + columns, mask=is_column, other=0).to(tl.float32) * scale
        factors = column_scale + expert.to(tl.int64) * 2 * width + columns
        gate = gate * tl.load(factors, mask=is_column, other=0.0)
        up = up * tl.load(factors + width, mask=is_column, other=0.0)
        y = tl.where(is_column, gate / (1.0 + tl.exp(-gate)) * up, 0.0)
        _store_quantized(y, columns < width, q, scales, row, width, columns)


@triton.jit
def _quantize(x, q, scales, rows, width, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    is_column = columns < width
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        y = tl.load(x + row * width + columns, mask=is_column, other=0.0).to(tl.float32)
        _store_quantized(y, is_column, q, scales, row, width, columns)


def _results(shape: torch.Size, like: Tensor, quant: bool) -> tuple[Tensor, Tensor]:
    """The result and its scales; without `quant` the scales are the result, which nobody writes them to."""
    out = torch.empty(shape, dtype=torch.int8 if quant else like.dtype, device=like.device)
    return out, torch.empty(shape[:-1], dtype=torch.float32, device=like.device) if quant else out


def _norm_rows(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, quant: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(result, its scales, sum); scales and sum mean something where there is `quant` and a residual."""
    out, scales = _results(x.shape, x, quant)
    total = x if residual is None else torch.empty_like(x)
    flat = x.reshape(-1, x.shape[-1])
    rows, width = flat.shape
    if rows:
        block = power_of_two(width)
        _norm[programs(rows)](
            flat, x if residual is None else residual, weight, out, scales, total, rows, width, flat.stride(0), eps,
            ADD=residual is not None, QUANT=quant, BLOCK=block, num_warps=warps(block),
        )  # fmt: skip
    return out, scales, total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm_rows(x, None, weight, eps, quant=False)[0]


def rms_norm_quant(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _norm_rows(x, None, weight, eps, quant=True)[:2]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, _, total = _norm_rows(x, residual, weight, eps, quant=False)
    return out, total


def add_rms_norm_quant(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_rows(x, residual, weight, eps, quant=True)


def _activate_rows(gate_up: Tensor, quant: bool) -> tuple[Tensor, Tensor]:
    width = gate_up.shape[-1] // 2
    out, scales = _results(torch.Size((*gate_up.shape[:-1], width)), gate_up, quant)
    rows = gate_up.numel() // (2 * width)
    if rows:
        block = power_of_two(width)
        _activate[programs(rows)](gate_up, out, scales, rows, width, QUANT=quant, BLOCK=block, num_warps=warps(block))
    return out, scales


def swiglu(gate_up: Tensor) -> Tensor:
    return _activate_rows(gate_up, quant=False)[0]


def swiglu_quant(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return _activate_rows(gate_up, quant=True)


def dequant_swiglu_quant(
    acc: Tensor, row_scale: Tensor, column_scale: Tensor, group_sizes: Tensor
) -> tuple[Tensor, Tensor]:
    rows, width = acc.shape[0], acc.shape[1] // 2
    q, scales = _results(torch.Size((rows, width)), acc, quant=True)
    if rows:
        block = power_of_two(width)
        _dequantize_activate[programs(rows)](
            acc, row_scale, column_scale, group_sizes, q, scales, rows, width, len(group_sizes),
            GROUPS=power_of_two(len(group_sizes)), BLOCK=block, num_warps=warps(block),
        )  # fmt: skip
    return q, scales


def dynamic_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    q, scales = _results(x.shape, x, quant=True)
    if rows := scales.numel():
        width = x.shape[-1]
        block = power_of_two(width)
        _quantize[programs(rows)](x, q, scales, rows, width, BLOCK=block, num_warps=warps(block))
    return q, scales


KERNELS: Mapping[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "rms_norm_quant": rms_norm_quant,
    "add_rms_norm_quant": add_rms_norm_quant,
    "dynamic_quant": dynamic_quant,
    "swiglu": swiglu,
    "swiglu_quant": swiglu_quant,
    "dequant_swiglu_quant": dequant_swiglu_quant,
}
