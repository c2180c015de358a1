"""Gated activation as one compiled loop over rows, with what may stand before and after it."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from omni_kernels.backends.cpu.compiled import pointer
from omni_kernels.backends.cpu.rows import (
    FLOAT,
    KNOWN,
    WORD,
    address,
    empty_quantized,
    exponential,
    load,
    loop,
    part,
    quantize,
    store,
)
from omni_kernels.ops.swiglu import SWIGLU, SWIGLU_QUANT

_LONG = np.int64


@part
def _activate(gate: Any, up: Any) -> None:
    """gate = silu(gate) * up."""
    for i in range(len(gate)):
        gate[i] = gate[i] / (FLOAT(1) + exponential(-gate[i])) * up[i]


@loop
def _gate_rows(x_at: int, y_at: int, q_at: int, scale_at: int, rows: int, columns: int, is_half: bool) -> None:
    """Fill y, or where its address is 0 q and scale."""
    size = 2 if is_half else 4
    gate, up = np.empty(columns, FLOAT), np.empty(columns, FLOAT)
    for r in range(rows):
        load(x_at + 2 * r * columns * size, gate, is_half)
        load(x_at + (2 * r + 1) * columns * size, up, is_half)
        _activate(gate, up)
        if y_at:
            store(gate, y_at + r * columns * size, is_half)
        else:
            quantize(gate, q_at + r * columns, scale_at + 4 * r)


@loop
def _dequant_rows(
    acc_at: int,
    row_scale_at: int,
    column_scale_at: int,
    sizes_at: int,
    groups: int,
    q_at: int,
    scale_at: int,
    rows: int,
    columns: int,
) -> None:
    sizes = carray(pointer(sizes_at, _LONG), (groups,))
    row_scale = carray(pointer(row_scale_at, FLOAT), (rows,))
    gate, up = np.empty(columns, FLOAT), np.empty(columns, FLOAT)
    group, end = 0, sizes[0]
    for r in range(rows):
        while r >= end and group < groups - 1:
            group += 1
            end += sizes[group]
        if r >= end:
            for i in range(columns):
                gate[i] = FLOAT(0)
        else:
            acc = carray(pointer(acc_at + 8 * r * columns, WORD), (2 * columns,))
            scale = carray(pointer(column_scale_at + 8 * group * columns, FLOAT), (2 * columns,))
            for i in range(columns):
                gate[i] = FLOAT(acc[i]) * scale[i] * row_scale[r]
                up[i] = FLOAT(acc[columns + i]) * scale[columns + i] * row_scale[r]
            _activate(gate, up)
        quantize(gate, q_at + r * columns, scale_at + 4 * r)


def _run(gate_up: Tensor, y: Tensor | None, quantized: tuple[Tensor | None, Tensor | None]) -> None:
    columns = gate_up.shape[-1] // 2
    rows, is_half = gate_up.numel() // (2 * columns), gate_up.dtype is torch.bfloat16
    _gate_rows(gate_up.data_ptr(), address(y), address(quantized[0]), address(quantized[1]), rows, columns, is_half)


def _swiglu(gate_up: Tensor) -> Tensor:
    if gate_up.dtype not in KNOWN:
        return SWIGLU.meaning(gate_up)
    y = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
    _run(gate_up, y, (None, None))
    return y


def _swiglu_quant(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    if gate_up.dtype not in KNOWN:
        return SWIGLU_QUANT.meaning(gate_up)
    quantized = empty_quantized((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
    _run(gate_up, None, quantized)
    return quantized


def _dequant_swiglu_quant(
    acc: Tensor, row_scale: Tensor, column_scale: Tensor, group_sizes: Tensor
) -> tuple[Tensor, Tensor]:
    rows, columns = acc.shape[0], acc.shape[1] // 2
    q, scale = empty_quantized((rows, columns))
    _dequant_rows(
        acc.data_ptr(),
        row_scale.data_ptr(),
        column_scale.data_ptr(),
        group_sizes.data_ptr(),
        group_sizes.shape[0],
        q.data_ptr(),
        scale.data_ptr(),
        rows,
        columns,
    )
    return q, scale


KERNELS: Mapping[str, Callable[..., Any]] = {
    "swiglu": _swiglu,
    "swiglu_quant": _swiglu_quant,
    "dequant_swiglu_quant": _dequant_swiglu_quant,
}
