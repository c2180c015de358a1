"""Root-mean-square normalisation and dynamic quantization: one compiled loop over rows for all of them."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni_kernels.backends.cpu.rows import FLOAT, KNOWN, address, empty_quantized, load, loop, quantize, store
from omni_kernels.ops.quant import DYNAMIC_QUANT
from omni_kernels.ops.rms_norm import ADD_RMS_NORM, ADD_RMS_NORM_QUANT, RMS_NORM, RMS_NORM_QUANT


@loop
def _norm_rows(
    x_at: int,
    stride: int,
    residual_at: int,
    weight_at: int,
    eps: float,
    y_at: int,
    q_at: int,
    scale_at: int,
    sum_at: int,
    rows: int,
    columns: int,
    is_half: bool,
) -> None:
    """Rows of `x` are `stride` elements apart, all others lie densely. An address of 0: there is none."""
    size = 2 if is_half else 4
    weight, row, other = np.empty(columns, FLOAT), np.empty(columns, FLOAT), np.empty(columns, FLOAT)
    if weight_at:
        load(weight_at, weight, is_half)
    for r in range(rows):
        offset = r * columns * size
        load(x_at + r * stride * size, row, is_half)
        if residual_at:
            load(residual_at + offset, other, is_half)
            for i in range(columns):
                row[i] += other[i]
            store(row, sum_at + offset, is_half)
        if weight_at:
            squares = FLOAT(0)
            for i in range(columns):
                squares += row[i] * row[i]
            factor = FLOAT(1) / np.sqrt(squares / FLOAT(columns) + FLOAT(eps))
            for i in range(columns):
                row[i] = row[i] * factor * weight[i]
        if y_at:
            store(row, y_at + offset, is_half)
        else:
            quantize(row, q_at + r * columns, scale_at + 4 * r)


def _run(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 0.0,
    *,
    y: Tensor | None = None,
    quantized: tuple[Tensor | None, Tensor | None] = (None, None),
    total: Tensor | None = None,
) -> None:
    columns = x.shape[-1]
    if not (plain := x.is_contiguous()) and x.ndim > 2:
        x, plain = x.contiguous(), True
    _norm_rows(
        x.data_ptr(),
        columns if plain else x.stride(0),
        address(residual),
        address(weight),
        eps,
        address(y),
        address(quantized[0]),
        address(quantized[1]),
        address(total),
        x.numel() // columns,
        columns,
        x.dtype is torch.bfloat16,
    )


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype not in KNOWN:
        return RMS_NORM.meaning(x, weight, eps)
    y = x.new_empty(x.shape)
    _run(x, None, weight, eps, y=y)
    return y


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.dtype not in KNOWN:
        return ADD_RMS_NORM.meaning(x, residual, weight, eps)
    y, total = torch.empty_like(x), torch.empty_like(x)
    _run(x, residual, weight, eps, y=y, total=total)
    return y, total


def _rms_norm_quant(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.dtype not in KNOWN:
        return RMS_NORM_QUANT.meaning(x, weight, eps)
    quantized = empty_quantized(x.shape)
    _run(x, None, weight, eps, quantized=quantized)
    return quantized


def _add_rms_norm_quant(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype not in KNOWN:
        return ADD_RMS_NORM_QUANT.meaning(x, residual, weight, eps)
    quantized, total = empty_quantized(x.shape), torch.empty_like(x)
    _run(x, residual, weight, eps, quantized=quantized, total=total)
    return *quantized, total


def _dynamic_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dtype not in KNOWN:
        return DYNAMIC_QUANT.meaning(x)
    quantized = empty_quantized(x.shape)
    _run(x, quantized=quantized)
    return quantized


KERNELS: Mapping[str, Callable[..., Any]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rms_norm_quant": _rms_norm_quant,
    "add_rms_norm_quant": _add_rms_norm_quant,
    "dynamic_quant": _dynamic_quant,
}
