"""Parts of compiled loops over rows of float32 or bfloat16: a row is widened to float32, worked on, and written back.

Addresses are those of a row; `is_half` says bfloat16. One core does the work; a row stays in its cache meanwhile.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from numba import carray
from torch import Tensor

from omni_kernels.backends.cpu.compiled import as_float, pointer

F = TypeVar("F", bound=Callable[..., Any])
FLOAT, HALF, BITS, BYTE, WORD = np.float32, np.uint16, np.uint32, np.int8, np.int32
KNOWN = (torch.float32, torch.bfloat16)
"""Dtypes of rows; ops run as their meaning on others."""

_LOG2_E, _LN_2_HIGH, _LN_2_LOW = FLOAT(1.4426950408889634), FLOAT(0.693359375), FLOAT(-2.12194440e-4)


def loop(function: F) -> F:
    """Compiled on first call. Sums may be taken in another order: that lets them be vectors."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no folder to keep it in
        return cast(F, numba.njit(**options)(function))


def part(function: F) -> F:
    """Of a loop; computes in the order it is written in, also where the loop need not."""
    return cast(F, numba.njit(error_model="numpy", fastmath=False)(function))


@part
def load(at: int, row: Any, is_half: bool) -> None:
    if is_half:
        halves, bits = carray(pointer(at, HALF), row.shape), row.view(BITS)
        for i in range(len(row)):
            bits[i] = BITS(halves[i]) << BITS(16)
    else:
        whole = carray(pointer(at, FLOAT), row.shape)
        for i in range(len(row)):
            row[i] = whole[i]


@part
def store(row: Any, at: int, is_half: bool) -> None:
    """Rounds half to even."""
    if is_half:
        halves, bits = carray(pointer(at, HALF), row.shape), row.view(BITS)
        for i in range(len(row)):
            halves[i] = HALF((bits[i] + BITS(0x7FFF) + ((bits[i] >> BITS(16)) & BITS(1))) >> BITS(16))
    else:
        whole = carray(pointer(at, FLOAT), row.shape)
        for i in range(len(row)):
            whole[i] = row[i]


@part
def quantize(row: Any, q_at: int, scale_at: int) -> None:
    """As `omni_kernels.ops.quant.quantized`."""
    bits, largest = row.view(BITS), BITS(0)
    for i in range(len(row)):
        largest = max(largest, bits[i] & BITS(0x7FFFFFFF))  # floats of one sign are ordered as their bits are
    scale = as_float(WORD(largest)) / FLOAT(127)
    carray(pointer(scale_at, FLOAT), (1,))[0] = scale
    q = carray(pointer(q_at, BYTE), row.shape)
    divisor = scale if scale > 0 else FLOAT(1)
    for i in range(len(row)):
        q[i] = BYTE(min(max(WORD(np.rint(row[i] / divisor)), WORD(-127)), WORD(127)))


@part
def exponential(x: Any) -> Any:
    """e^x to 2e-7 of it: 2^n * e^r with |r| <= ln 2 / 2, the polynomial is that of Cephes' expf."""
    x = min(max(x, FLOAT(-87)), FLOAT(88))
    n = np.rint(x * _LOG2_E)
    r = x - n * _LN_2_HIGH - n * _LN_2_LOW
    p = FLOAT(1.9875691500e-4)
    p = p * r + FLOAT(1.3981999507e-3)
    p = p * r + FLOAT(8.3334519073e-3)
    p = p * r + FLOAT(4.1665795894e-2)
    p = p * r + FLOAT(1.6666665459e-1)
    p = p * r + FLOAT(5.0000001201e-1)
    return (p * r * r + r + FLOAT(1)) * as_float((WORD(n) + WORD(127)) << WORD(23))


def empty_quantized(shape: torch.Size | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(q, scale) to be filled for rows of `shape`."""
    return torch.empty(shape, dtype=torch.int8), torch.empty(shape[:-1], dtype=torch.float32)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
