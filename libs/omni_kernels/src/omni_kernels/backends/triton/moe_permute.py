"""Tokens to their experts' rows and back, by a stable counting sort of the pairs (token, choice).

Pairs are cut into chunks. Each chunk counts its pairs per slot; one cumulative sum over (slot, chunk) says where each
chunk's pairs of each slot begin; within a chunk a pair stands behind the equal ones before it.

On Ascend: torch.cumsum and row copies at computed addresses; the comparison of a chunk with itself is a 128 x 128 tile.
Not run on Ascend.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from omni_kernels.backends.triton.language import narrow, power_of_two, programs

_CHUNK = 128
_COLUMNS = 2048


@triton.jit
def _chunk_slots(slots, chunk, pairs, num_slots, CHUNK: tl.constexpr):
    """The slots of a chunk's pairs, num_slots for those of other ranks, and which pairs of it precede an equal one."""
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    slot = tl.load(slots + pair, mask=pair < pairs, other=-1)
    slot = tl.where((slot >= 0) & (slot < num_slots), slot, num_slots)
    slot = tl.where(pair < pairs, slot, num_slots + 1)
    return pair, slot, slot[:, None] == slot[None, :]


@triton.jit
def _count(slots, counts, pairs, num_slots, chunks, CHUNK: tl.constexpr):
    """counts (num_slots + 1, chunks), zeros before: every pair adds up its equals, the first of them writes."""
    lane = tl.arange(0, CHUNK)
    for chunk in range(tl.program_id(0).to(tl.int64), chunks, tl.num_programs(0)):
        pair, slot, is_equal = _chunk_slots(slots, chunk, pairs, num_slots, CHUNK)
        before = tl.sum((is_equal & (lane[None, :] < lane[:, None])).to(tl.int32), axis=1)
        equal = tl.sum(is_equal.to(tl.int32), axis=1)
        tl.store(counts + slot * chunks + chunk, equal, mask=(pair < pairs) & (before == 0))


@triton.jit
def _place(slots, ends, counts, source, pairs, num_slots, chunks, CHUNK: tl.constexpr):
    """source[row] = pair. `ends` is the cumulative sum of `counts` with its own entry included."""
    lane = tl.arange(0, CHUNK)
    for chunk in range(tl.program_id(0).to(tl.int64), chunks, tl.num_programs(0)):
        pair, slot, is_equal = _chunk_slots(slots, chunk, pairs, num_slots, CHUNK)
        before = tl.sum((is_equal & (lane[None, :] < lane[:, None])).to(tl.int32), axis=1)
        at = slot * chunks + chunk
        first = tl.load(ends + at, mask=pair < pairs, other=0) - tl.load(counts + at, mask=pair < pairs, other=0)
        tl.store(source + first + before, pair.to(tl.int32), mask=pair < pairs)


@triton.jit
def _gather_rows(
    x, source, ends, last, out, rows, width, TOP_K: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr
):
    """Row by row, x[source // TOP_K]; zero from row ends[last] on."""
    local = tl.load(ends + last)
    for piece in range(tl.program_id(0).to(tl.int64), rows * PIECES, tl.num_programs(0)):
        row = piece // PIECES
        column = (piece % PIECES) * BLOCK + tl.arange(0, BLOCK)
        token = (tl.load(source + row) // TOP_K).to(tl.int64)
        limit = tl.where(row < local, width, 0)
        values = tl.load(x + token * width + column, mask=column < limit, other=0.0)
        tl.store(out + row * width + column, values, mask=column < width)


@triton.jit
def _invert(source, where, rows, BLOCK: tl.constexpr):
    """where[source[row]] = row."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(source + row, mask=row < rows, other=0)
    tl.store(where + pair, row, mask=row < rows)


@triton.jit
def _combine(
    rows, where, weights, residual, out, tokens, width,
    TOP_K: tl.constexpr, RESIDUAL: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for piece in range(tl.program_id(0).to(tl.int64), tokens * PIECES, tl.num_programs(0)):
        token = piece // PIECES
        column = (piece % PIECES) * BLOCK + tl.arange(0, BLOCK)
        is_column = column < width
        acc = tl.zeros((BLOCK,), tl.float32)
        for choice in range(TOP_K):
            row = tl.load(where + token * TOP_K + choice).to(tl.int64)
            weight = tl.load(weights + token * TOP_K + choice).to(tl.float32)
            acc += weight * tl.load(rows + row * width + column, mask=is_column, other=0.0).to(tl.float32)
        if RESIDUAL:
            acc += tl.load(residual + token * width + column, mask=is_column, other=0.0).to(tl.float32)
        tl.store(out + token * width + column, narrow(acc, out.dtype.element_ty), mask=is_column)


def moe_permute(x: Tensor, slots: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens, top_k = slots.shape
    pairs, width = tokens * top_k, x.shape[1]
    rows = x.new_empty(pairs, width)
    source = torch.empty(pairs, dtype=torch.int32, device=x.device)
    if pairs == 0:
        return rows, source, torch.zeros(num_slots, dtype=torch.int64, device=x.device)
    chunks = triton.cdiv(pairs, _CHUNK)
    counts = torch.zeros(num_slots + 1, chunks, dtype=torch.int32, device=x.device)
    _count[programs(chunks)](slots, counts, pairs, num_slots, chunks, CHUNK=_CHUNK)
    ends = counts.flatten().cumsum(0, dtype=torch.int32)
    _place[programs(chunks)](slots, ends, counts, source, pairs, num_slots, chunks, CHUNK=_CHUNK)
    block = min(power_of_two(width), _COLUMNS)
    pieces = triton.cdiv(width, block)
    _gather_rows[programs(pairs * pieces)](
        x, source, ends, num_slots * chunks - 1, rows, pairs, width, TOP_K=top_k, PIECES=pieces, BLOCK=block
    )
    return rows, source, counts[:num_slots].sum(1)


def moe_combine(rows: Tensor, source: Tensor, weights: Tensor, residual: Tensor | None) -> Tensor:
    tokens, top_k = weights.shape
    width = rows.shape[1]
    out = rows.new_empty(tokens, width)
    if out.numel() == 0:
        return out
    where = torch.empty_like(source)
    _invert[(triton.cdiv(len(source), 1024),)](source, where, len(source), BLOCK=1024)
    block = min(power_of_two(width), _COLUMNS)
    pieces = triton.cdiv(width, block)
    _combine[programs(tokens * pieces)](
        rows, where, weights, rows if residual is None else residual, out, tokens, width,
        TOP_K=top_k, RESIDUAL=residual is not None, PIECES=pieces, BLOCK=block,
    )  # fmt: skip
    return out


KERNELS: Mapping[str, Callable[..., Any]] = {"moe_permute": moe_permute, "moe_combine": moe_combine}
