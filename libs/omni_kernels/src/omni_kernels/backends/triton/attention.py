"""Paged attention for grouped queries, full or with sink and recent positions only.

A program takes a tile of queries of one sequence, with all heads of a group as its rows, and walks over the keys with a
running softmax (Dao et al., 2022). Where tiles are few, the keys are split over programs and merged after
(flash-decoding, Dao et al., 2023). Tiles are counted per sequence inside the kernel: nothing is read back to the host.

On Ascend: a tile of keys lies in one block where block_size is a multiple of it (scalar table look-up); the gathering
form for other block sizes relies on discrete loads, which are slow there. The grid is tiles * heads * splits and must
stay below 65536. Not run on Ascend.
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
def _sequence_of_tile(query_start, tile, num_seqs, QUERIES: tl.constexpr, SEQS: tl.constexpr):
    """The sequence of query tile `tile`, and the tile's first query in it. Every sequence has one spare tile."""
    index = tl.arange(0, SEQS)
    starts = tl.load(query_start + index, mask=index < num_seqs, other=0)
    first_tiles = starts // QUERIES + index
    seq = tl.sum(((first_tiles <= tile) & (index < num_seqs)).to(tl.int32), axis=0) - 1
    begin = tl.load(query_start + seq)
    return seq, begin, (tile - begin // QUERIES - seq) * QUERIES


@triton.jit
def _attend(
    q, keys, values, table, query_start, seq_lens, out, peaks, sums,
    scale, num_seqs, table_width, block_size, heads, sink, recent,
    key_block, key_slot, key_head, value_block, value_slot, value_head,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SPARSE: tl.constexpr, SPLITS: tl.constexpr,
    IN_BLOCK: tl.constexpr, SEQS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    D_BLOCK: tl.constexpr, DV_BLOCK: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    seq, begin, offset = _sequence_of_tile(query_start, tl.program_id(0), num_seqs, QUERIES, SEQS)
    query_len = tl.load(query_start + seq + 1) - begin
    before = tl.load(seq_lens + seq) - query_len

    rows = tl.arange(0, ROWS)
    query = offset + rows // GROUP
    is_row = (rows < QUERIES * GROUP) & (query < query_len)
    position = before + query
    row = ((begin + query) * heads + kv_head * GROUP + rows % GROUP).to(tl.int64)
    d = tl.arange(0, D_BLOCK)
    dv = tl.arange(0, DV_BLOCK)
    queries = tl.load(q + row[:, None] * D + d[None, :], mask=is_row[:, None] & (d < D)[None, :], other=0.0)

    # Tiles of keys in order: those of the sink, then on from the first that any query of this tile sees as recent.
    visible = tl.where(offset < query_len, before + tl.minimum(offset + QUERIES, query_len), 0)
    tiles = (visible + TILE - 1) // TILE
    sink_tiles = 0
    skipped = 0
    if SPARSE:
        recent_tile = tl.minimum(tl.maximum(before + offset - recent + 1, 0) // TILE, tiles)
        sink_tiles = tl.minimum((sink + TILE - 1) // TILE, recent_tile)
        skipped = recent_tile - sink_tiles
    share = (tiles - skipped + SPLITS - 1) // SPLITS

    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DV_BLOCK), tl.float32)
    for step in range(split * share, tl.minimum((split + 1) * share, tiles - skipped)):
        start = step * TILE
        if SPARSE:
            start = tl.where(step < sink_tiles, step, step + skipped) * TILE
        columns = start + tl.arange(0, TILE)
        is_column = columns < visible
        if IN_BLOCK:
            block = tl.load(table + seq * table_width + start // block_size).to(tl.int64)
            slot = start % block_size + tl.arange(0, TILE)
            key_at = block * key_block + slot * key_slot
            value_at = block * value_block + slot * value_slot
        else:
            block = tl.load(table + seq * table_width + columns // block_size, mask=is_column, other=0).to(tl.int64)
            key_at = block * key_block + (columns % block_size) * key_slot
            value_at = block * value_block + (columns % block_size) * value_slot
        key = tl.load(
            keys + kv_head * key_head + key_at[None, :] + d[:, None],
            mask=is_column[None, :] & (d < D)[:, None],
            other=0.0,
        )
        scores = dot(queries, key, tl.zeros((ROWS, TILE), tl.float32)) * (scale * LOG2_E)
        is_seen = is_row[:, None] & (columns[None, :] <= position[:, None])
        if SPARSE:
            is_seen = is_seen & ((columns < sink)[None, :] | (columns[None, :] > position[:, None] - recent))
        scores = tl.where(is_seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        value = tl.load(
            values + kv_head * value_head + value_at[:, None] + dv[None, :],
            mask=is_column[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        total = total * shrink + tl.sum(weights, axis=1)
        acc = dot(narrow(weights, value.dtype), value, acc * shrink[:, None])
        peak = new_peak

    if SPLITS == 1:
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        mask = is_row[:, None] & (dv < DV)[None, :]
        tl.store(out + row[:, None] * DV + dv[None, :], narrow(result, out.dtype.element_ty), mask=mask)
    else:
        part = row * SPLITS + split
        tl.store(out + part[:, None] * DV + dv[None, :], acc, mask=is_row[:, None] & (dv < DV)[None, :])
        tl.store(peaks + part, peak, mask=is_row)
        tl.store(sums + part, total, mask=is_row)


def _launch(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: tuple[int, int] | None,
) -> Tensor:
    """`window`: (sink, recent) positions seen, None for all."""
    tokens, heads, width = q.shape
    block_size, kv_heads, value_width = value_cache.shape[1:]
    num_seqs, table_width = block_table.shape
    out = q.new_empty(tokens, heads, value_width)
    if tokens == 0:
        return out
    group = heads // kv_heads
    rows, tile = _tiling(tokens / num_seqs, group, max(width, value_width), q.element_size())
    num_tiles = tokens // (rows // group) + num_seqs
    parts = Parts.of(out, num_tiles * kv_heads, table_width * block_size)
    _attend[(num_tiles, kv_heads, parts.splits)](
        q, key_cache, value_cache, *on(q.device, block_table, query_start, seq_lens),
        parts.sums_of_values, parts.peaks, parts.sums,
        scale, num_seqs, table_width, block_size, heads, *(window or (0, 0)), *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        GROUP=group, D=width, DV=value_width, SPARSE=window is not None, SPLITS=parts.splits,
        IN_BLOCK=block_size % tile == 0, SEQS=power_of_two(num_seqs), ROWS=rows, TILE=tile,
        D_BLOCK=power_of_two(width, 16), DV_BLOCK=power_of_two(value_width, 16),
        num_warps=8 if rows > 64 else 4, num_stages=2,
    )  # fmt: skip
    parts.merge(out)
    return out


def _tiling(queries: float, group: int, width: int, element_size: int) -> tuple[int, int]:
    """Rows and keys of a tile for that many queries a sequence. Held down where the tiles would not fit on chip."""
    roomy = element_size == 2 and width <= 128
    rows = power_of_two(min(int(queries) * group, 128 if roomy else 32), 16)
    return max(rows, power_of_two(group)), 64 if roomy else 32


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    return _launch(q, key_cache, value_cache, block_table, query_start, seq_lens, scale, None)


def sink_recent_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
    sink: int,
    recent: int,
) -> Tensor:
    return _launch(q, key_cache, value_cache, block_table, query_start, seq_lens, scale, (sink, recent))


KERNELS: Mapping[str, Callable[..., Any]] = {
    "paged_attention": paged_attention,
    "sink_recent_attention": sink_recent_attention,
}
