"""Rotary position embedding: a program turns all heads of one token.

On Ascend: interleaved pairs are read and written with a stride of two, slow there. Not run on Ascend.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Callable, Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from omni_kernels.backends.triton.language import narrow, power_of_two, programs, warps


@triton.jit
def _rotate(
    x, cos, sin, out, tokens, heads, x_token, x_head,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr, KEPT_BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF_BLOCK)
    is_pair = (head < heads) & (pair < HALF)[None, :]
    if INTERLEAVED:
        at = 2 * pair[None, :]
        other = at + 1
    else:
        at = pair[None, :]
        other = at + HALF
    for token in range(tl.program_id(0).to(tl.int64), tokens, tl.num_programs(0)):
        c = tl.load(cos + token * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        s = tl.load(sin + token * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        source = x + token * x_token + head * x_head
        target = out + (token * heads + head) * D
        first = tl.load(source + at, mask=is_pair, other=0.0).to(tl.float32)
        second = tl.load(source + other, mask=is_pair, other=0.0).to(tl.float32)
        tl.store(target + at, narrow(first * c - second * s, out.dtype.element_ty), mask=is_pair)
        tl.store(target + other, narrow(second * c + first * s, out.dtype.element_ty), mask=is_pair)
        if 2 * HALF < D:
            kept = 2 * HALF + tl.arange(0, KEPT_BLOCK)[None, :]
            is_kept = (head < heads) & (kept < D)
            tl.store(target + kept, tl.load(source + kept, mask=is_kept), mask=is_kept)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    tokens, heads, width = x.shape
    half = cos.shape[1]
    out = x.new_empty(tokens, heads, width)
    if out.numel():
        _rotate[programs(tokens)](
            x, cos, sin, out, tokens, heads, x.stride(0), x.stride(1),
            D=width, HALF=half, INTERLEAVED=interleaved,
            HEADS=power_of_two(heads), HALF_BLOCK=power_of_two(half), KEPT_BLOCK=power_of_two(width - 2 * half),
            num_warps=warps(power_of_two(heads * half)),
        )  # fmt: skip
    return out


KERNELS: Mapping[str, Callable[..., Any]] = {"rotary": rotary}
