"""Root-mean-square normalisation (Zhang and Sennrich, 2019), alone, after a residual sum, and quantized to int8."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, device

from omni_kernels.case import MODELS, TINY, TOLERANCE, Case, declare, dtype_name
from omni_kernels.checks import (
    FLOATS,
    has_dtype,
    has_rows,
    has_shape,
    is_contiguous,
    is_positive,
    on_device_of,
    wide,
)
from omni_kernels.ops.quant import fake_quant, quantized


def _normed(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * weight


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each row of `x` (..., H) to unit root-mean-square, then by `weight` (H,).

    Computes in float32; the result has the dtype of `x` and is contiguous. Rows of `x` may be strided.
    Raises ValueError when dtype or size of `weight` are not those of the rows, or `eps` is not positive.
    """
    return _normed(wide(x), weight, eps).to(x.dtype).contiguous()


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm of x + residual, x + residual): the sum is taken in float32, and rounded after it was normalised.

    `x` and `residual` (..., H), `weight` (H,), one dtype, which both results have.
    Raises ValueError when they do not match, or `eps` is not positive.
    """
    rows = wide(x) + residual
    return _normed(rows, weight, eps).to(x.dtype), rows.to(x.dtype)


def _rms_norm_quant(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dynamic_quant of the float32 rms_norm of `x` (..., H): (int8 (..., H), scale float32 (...)).

    Raises ValueError when dtype or size of `weight` are not those of the rows, or `eps` is not positive.
    """
    return quantized(_normed(wide(x), weight, eps))


def _add_rms_norm_quant(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """dynamic_quant of the float32 rms_norm of x + residual, and the sum: (int8, scale float32 (...), sum).

    `x` and `residual` (..., H), `weight` (H,), one dtype, which the sum has.
    Raises ValueError when they do not match, or `eps` is not positive.
    """
    rows = wide(x) + residual
    return *quantized(_normed(rows, weight, eps)), rows.to(x.dtype)


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    has_dtype("x", x, *FLOATS)
    has_rows("x", x)
    has_dtype("weight", weight, x.dtype)
    has_shape("weight", weight, x.shape[-1:])
    is_contiguous("weight", weight)
    on_device_of("weight", weight, x)
    is_positive("eps", eps)


def _check_quant(x: Tensor, weight: Tensor, eps: float) -> None:
    _check(x, weight, eps)
    is_contiguous("x", x)


def _check_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    _check_quant(x, weight, eps)
    has_dtype("residual", residual, x.dtype)
    has_shape("residual", residual, x.shape)
    is_contiguous("residual", residual)
    on_device_of("residual", residual, x)


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _fake_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _fake_quant(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return fake_quant(x)


def _fake_add_quant(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return *fake_quant(x), torch.empty_like(x)


def _samples(
    op: str, tensors: int, loose: tuple[int, ...] = (), tolerance: Mapping[torch.dtype, tuple[float, float]] = TOLERANCE
) -> Callable[[device], Iterator[Case]]:
    """Cases of `tensors` inputs (rows, H), a weight and eps, for one op of the family."""

    def samples(where: device) -> Iterator[Case]:
        generator = torch.Generator().manual_seed(0)

        def case(label: str, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
            rows = [torch.randn(shape, generator=generator).to(where, dtype) for _ in range(tensors)]
            weight = torch.rand(shape[-1], generator=generator).to(where, dtype)
            inputs: tuple[Any, ...] = (*rows, weight, 1e-6)
            return Case(f"{op}-{label}-{dtype_name(dtype)}", inputs, *tolerance[dtype], loose)

        for dtype in FLOATS:
            for model in MODELS:
                yield case(model.name, (7, model.hidden), dtype)
            yield case("one row", (1, TINY.hidden), dtype)
            yield case("no rows", (0, TINY.hidden), dtype)
            yield case("heads", (3, TINY.heads, TINY.head_dim), dtype)
            yield case("odd", (2, 77), dtype)

    return samples


def _samples_with_strides(where: device) -> Iterator[Case]:
    yield from _samples("rms_norm", 1)(where)
    for dtype in FLOATS:
        fused = torch.randn(5, 3 * TINY.head_dim, generator=torch.Generator().manual_seed(1)).to(where, dtype)
        rows, weight = fused[:, TINY.head_dim : 2 * TINY.head_dim], fused[0, : TINY.head_dim].clone()
        yield Case(f"rms_norm-strided rows-{dtype_name(dtype)}", (rows, weight, 1e-5), *TOLERANCE[dtype])


_SCALES = dict.fromkeys(FLOATS, (1e-7, 1e-5))
_SCALES_AND_SUMS = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-6, 4e-3), torch.float16: (1e-6, 5e-4)}
"""A sum is rounded once, by half a unit in the last place."""

RMS_NORM = declare("rms_norm", _rms_norm, _fake, _check, _samples_with_strides)
ADD_RMS_NORM = declare("add_rms_norm", _add_rms_norm, _fake_add, _check_add, _samples("add_rms_norm", 2))
RMS_NORM_QUANT = declare(
    "rms_norm_quant", _rms_norm_quant, _fake_quant, _check_quant, _samples("rms_norm_quant", 1, (0,), _SCALES)
)
ADD_RMS_NORM_QUANT = declare(
    "add_rms_norm_quant",
    _add_rms_norm_quant,
    _fake_add_quant,
    _check_add,
    _samples("add_rms_norm_quant", 2, (0,), _SCALES_AND_SUMS),
)
rms_norm = RMS_NORM.call
add_rms_norm = ADD_RMS_NORM.call
rms_norm_quant = RMS_NORM_QUANT.call
add_rms_norm_quant = ADD_RMS_NORM_QUANT.call

OPS = (RMS_NORM, ADD_RMS_NORM, RMS_NORM_QUANT, ADD_RMS_NORM_QUANT)
