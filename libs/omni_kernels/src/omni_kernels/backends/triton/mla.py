"""Latent attention in its absorbed form (DeepSeek-AI, 2024), over all positions or over chosen ones.

A program takes one query token and a tile of its heads: all heads read the same latent, so the heads are the rows of
the products. What is a key in the first product is the value in the second and is loaded once.

On Ascend: chosen positions are discrete loads, slow there; a tile of 512 latent columns and 16 to 64 heads may need
smaller tiles to fit its buffers. The grid is tokens * head tiles * splits and must stay below 65536. Not run on Ascend.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Callable, Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from omni_kernels.backends.triton.language import LOG2_E, dot, narrow, on, power_of_two
from omni_kernels.backends.triton.splits import Parts


@triton.jit
def sequence_of_token(query_start, token, num_seqs, SEQS: tl.constexpr):
    """The sequence that `token` belongs to: that many sequences end before it."""
    index = tl.arange(0, SEQS)
    ends = tl.load(query_start + 1 + index, mask=index < num_seqs, other=0)
    return tl.sum(((ends <= token) & (index < num_seqs)).to(tl.int32), axis=0)


@triton.jit
def _attend_latent(
    q_latent, q_rope, cache, table, query_start, seq_lens, chosen, out, peaks, sums,
    scale, num_seqs, table_width, block_size, heads, count, cache_block, cache_slot,
    RANK: tl.constexpr, ROPE: tl.constexpr, SPARSE: tl.constexpr, SPLITS: tl.constexpr, IN_BLOCK: tl.constexpr,
    SEQS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, RANK_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    split = tl.program_id(2)
    seq = tl.minimum(sequence_of_token(query_start, token, num_seqs, SEQS), num_seqs - 1)
    visible = tl.load(seq_lens + seq) - tl.load(query_start + seq + 1) + token + 1

    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = head < heads
    row = token.to(tl.int64) * heads + head
    r = tl.arange(0, RANK_BLOCK)
    p = tl.arange(0, ROPE_BLOCK)
    is_latent = is_row[:, None] & (r < RANK)[None, :]
    latent_query = tl.load(q_latent + row[:, None] * RANK + r[None, :], mask=is_latent, other=0.0)
    rope_query = tl.load(
        q_rope + row[:, None] * ROPE + p[None, :], mask=is_row[:, None] & (p < ROPE)[None, :], other=0.0
    )

    keys = visible
    if SPARSE:
        keys = count
    tiles = (keys + TILE - 1) // TILE
    share = (tiles + SPLITS - 1) // SPLITS
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, RANK_BLOCK), tl.float32)
    for step in range(split * share, tl.minimum((split + 1) * share, tiles)):
        index = step * TILE + tl.arange(0, TILE)
        if SPARSE:
            columns = tl.load(chosen + token.to(tl.int64) * count + index, mask=index < count, other=-1)
            is_column = (columns >= 0) & (columns < visible)
            columns = tl.where(is_column, columns, 0)
        else:
            columns = index
            is_column = columns < visible
        if IN_BLOCK:
            block = tl.load(table + seq * table_width + step * TILE // block_size).to(tl.int64)
        else:
            block = tl.load(table + seq * table_width + columns // block_size, mask=is_column, other=0).to(tl.int64)
        at = block * cache_block + (columns % block_size) * cache_slot
        latent = tl.load(cache + at[:, None] + r[None, :], mask=is_column[:, None] & (r < RANK)[None, :], other=0.0)
        rope = tl.load(
            cache + RANK + at[None, :] + p[:, None], mask=is_column[None, :] & (p < ROPE)[:, None], other=0.0
        )
        scores = dot(latent_query, tl.trans(latent), tl.zeros((ROWS, TILE), tl.float32))
        scores = dot(rope_query, rope, scores) * (scale * LOG2_E)
        scores = tl.where(is_row[:, None] & is_column[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = dot(narrow(weights, latent.dtype), latent, acc * shrink[:, None])
        peak = new_peak

    if SPLITS == 1:
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + row[:, None] * RANK + r[None, :], narrow(result, out.dtype.element_ty), mask=is_latent)
    else:
        part = row * SPLITS + split
        tl.store(out + part[:, None] * RANK + r[None, :], acc, mask=is_latent)
        tl.store(peaks + part, peak, mask=is_row)
        tl.store(sums + part, total, mask=is_row)


def _launch(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    chosen: Tensor | None,
    scale: float,
) -> Tensor:
    tokens, heads, rank = q_latent.shape
    block_size = cache.shape[1]
    num_seqs, table_width = block_table.shape
    out = q_latent.new_empty(tokens, heads, rank)
    if tokens == 0:
        return out
    count = 0 if chosen is None else chosen.shape[1]
    rows, tile = (power_of_two(min(heads, 64), 16), 32) if q_latent.element_size() == 2 else (16, 16)
    head_tiles = triton.cdiv(heads, rows)
    parts = Parts.of(out, tokens * head_tiles, table_width * block_size if chosen is None else count)
    _attend_latent[(tokens, head_tiles, parts.splits)](
        q_latent, q_rope, cache, *on(cache.device, block_table, query_start, seq_lens),
        block_table if chosen is None else chosen,
        parts.sums_of_values, parts.peaks, parts.sums,
        scale, num_seqs, table_width, block_size, heads, count, *cache.stride()[:2],
        RANK=rank, ROPE=q_rope.shape[2], SPARSE=chosen is not None, SPLITS=parts.splits,
        IN_BLOCK=chosen is None and block_size % tile == 0, SEQS=power_of_two(num_seqs), ROWS=rows, TILE=tile,
        RANK_BLOCK=power_of_two(rank, 16), ROPE_BLOCK=power_of_two(q_rope.shape[2], 16),
        num_warps=8 if rows > 32 else 4, num_stages=2,
    )  # fmt: skip
    parts.merge(out)
    return out


def mla_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    return _launch(q_latent, q_rope, cache, block_table, query_start, seq_lens, None, scale)


def sparse_mla_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    positions: Tensor,
    scale: float,
) -> Tensor:
    return _launch(q_latent, q_rope, cache, block_table, query_start, seq_lens, positions, scale)


KERNELS: Mapping[str, Callable[..., Any]] = {
    "mla_attention": mla_attention,
    "sparse_mla_attention": sparse_mla_attention,
}
