"""Symmetric int8 quantization with a scale for each row, found as it runs."""

from collections.abc import Iterator

import torch
from torch import Tensor, device

from omni_kernels.case import MODELS, TINY, Case, declare, dtype_name
from omni_kernels.checks import FLOATS, has_dtype, has_rows, is_contiguous, wide


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale) of `rows` (..., H) in float32 or float64: scale = absmax / 127, q = rows / scale, half to even.

    A row of zeros has scale 0 and q = 0.
    """
    scale = rows.abs().amax(-1) / 127
    divisor = torch.where(scale == 0, 1, scale).unsqueeze(-1)
    return (rows / divisor).round().clamp(-127, 127).to(torch.int8), scale


def fake_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _dynamic_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale) of `x` (..., H): int8 (..., H) and float32 (...), so that q * scale is `x` to within scale / 2.

    scale is the largest magnitude of the row over 127; q rounds half to even. A row of zeros has scale 0.
    Raises ValueError for other dtypes than float32, bfloat16 and float16.
    """
    return quantized(wide(x))


def _check(x: Tensor) -> None:
    has_dtype("x", x, *FLOATS)
    has_rows("x", x)
    is_contiguous("x", x)


def _samples(where: device) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(model.name, (7, model.hidden)) for model in MODELS]
    shapes += [("one row", (1, TINY.hidden)), ("no rows", (0, TINY.hidden)), ("odd", (2, 77))]
    for dtype in FLOATS:
        for label, shape in shapes:
            x = torch.randn(shape, generator=generator).to(where, dtype)
            yield Case(f"dynamic_quant-{label}-{dtype_name(dtype)}", (x,), 1e-7, 1e-6, loose=(0,))
        x = torch.randn(3, 2, TINY.head_dim, generator=generator).to(where, dtype)
        x[1] = 0
        yield Case(f"dynamic_quant-rows of zeros-{dtype_name(dtype)}", (x,), 1e-7, 1e-6, loose=(0,))


DYNAMIC_QUANT = declare("dynamic_quant", _dynamic_quant, fake_quant, _check, _samples)
dynamic_quant = DYNAMIC_QUANT.call

OPS = (DYNAMIC_QUANT,)
