"""Rotary position embedding (Su et al., 2021)."""

from collections.abc import Iterator

import torch
from torch import Tensor, device

from omni_kernels.case import MODELS, TINY, TOLERANCE, Case, declare, dtype_name
from omni_kernels.checks import (
    FLOATS,
    has_dims,
    has_dtype,
    has_shape,
    has_unit_stride,
    is_contiguous,
    on_device_of,
    refuse,
    wide,
)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first R of the D elements of every head of `x` (T, heads, D) by the angles of its token.

    `cos` and `sin` (T, R / 2) are of the dtype of `x` or float32. Pair i is elements 2i and 2i + 1 where `interleaved`
    (GPT-J, DeepSeek), else i and i + R / 2 (NeoX, Qwen). Computes in float32; the result has the dtype of `x` and is
    contiguous. Rows of `x` may be strided.
    Raises ValueError when sizes or dtypes do not match, or R is larger than D.
    """
    half = cos.shape[-1]
    rotated, kept = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = wide(cos).unsqueeze(1), wide(sin).unsqueeze(1)
    first, second = (
        (rotated[..., ::2], rotated[..., 1::2]) if interleaved else (rotated[..., :half], rotated[..., half:])
    )
    first, second = wide(first), wide(second)
    turned = (first * cos - second * sin, second * cos + first * sin)
    whole = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((whole.to(x.dtype), kept), dim=-1)


def _check(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    has_dtype("x", x, *FLOATS)
    has_dims("x", x, 3)
    has_unit_stride("x", x)
    has_dtype("cos", cos, x.dtype, torch.float32)
    has_shape("cos", cos, (x.shape[0], -1))
    is_contiguous("cos", cos)
    on_device_of("cos", cos, x)
    if not 0 < 2 * cos.shape[1] <= x.shape[2]:
        refuse("cos", f"last dimension must be from 1 to half of that of x, {x.shape[2] // 2}", cos.shape[1])
    has_dtype("sin", sin, cos.dtype)
    has_shape("sin", sin, cos.shape)
    is_contiguous("sin", sin)
    on_device_of("sin", sin, x)


def _fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return x.new_empty(x.shape)


def _samples(where: device) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)

    def case(label: str, x: Tensor, rotated: int, interleaved: bool, table: torch.dtype) -> Case:
        tokens, style = x.shape[0], "interleaved" if interleaved else "halves"
        frequencies = 1e6 ** -(torch.arange(0, rotated, 2) / rotated)
        angles = torch.randint(0, 4096, (tokens, 1), generator=generator) * frequencies
        inputs = (x, angles.cos().to(where, table), angles.sin().to(where, table), interleaved)
        return Case(f"rotary-{label}-{style}-{dtype_name(x.dtype)}", inputs, *TOLERANCE[x.dtype])

    def heads(tokens: int, count: int, size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(tokens, count, size, generator=generator).to(where, dtype)

    for dtype in FLOATS:
        for interleaved in (False, True):
            for model in MODELS:
                rotated = model.rope or model.head_dim
                yield case(model.name, heads(7, model.heads, rotated, dtype), rotated, interleaved, torch.float32)
            yield case("in part", heads(5, 3, 96, dtype), 64, interleaved, torch.float32)
            yield case("table of x's dtype", heads(5, 3, 64, dtype), 64, interleaved, dtype)
            yield case("one token", heads(1, 1, 2, dtype), 2, interleaved, torch.float32)
            yield case("no tokens", heads(0, 4, 64, dtype), 64, interleaved, torch.float32)
            fused = heads(5, 6, TINY.head_dim, dtype)
            yield case("strided rows", fused[:, 2:4], TINY.head_dim, interleaved, torch.float32)


ROTARY = declare("rotary", _rotary, _fake, _check, _samples)
rotary = ROTARY.call

OPS = (ROTARY,)
