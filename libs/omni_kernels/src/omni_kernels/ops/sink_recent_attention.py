"""Attention to the first and the latest tokens only (Xiao et al., 2024), per layer in OmniAttn (omni-infer, 2025)."""

from collections.abc import Iterator

import torch
from torch import Tensor, device

from omni_kernels.case import QWEN3_MOE, TINY, Case, declare
from omni_kernels.checks import refuse
from omni_kernels.ops.paged_attention import check_attention
from omni_kernels.ops.paged_samples import LARGE, SMALL, case_name, normal, tolerances
from omni_kernels.ops.paging import attend, gather, rows_at_a_time, spans

_ROWS = 128


def _sink_recent_attention(
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
    """`paged_attention` where a query at position t sees position p <= t only if p < sink or p > t - recent.

    Reads no token that no query row sees, so the cost of a decode row does not grow with its sequence. `sink` and
    `recent` count tokens, the query's own among the recent ones. Raises ValueError when one is negative or both are 0.
    """
    out = q.new_empty(*q.shape[:2], value_cache.shape[-1])
    for span in spans(query_start, seq_lens):
        table = block_table[span.row]
        rows_at_once = min(_ROWS, rows_at_a_time(q.shape[1], min(span.length, sink + recent + _ROWS)))
        for piece in span.pieces(rows_at_once):
            ranges = kept(piece.start, piece.length, sink, recent)
            keys, values = (torch.cat([gather(c, table, *r) for r in ranges]) for c in (key_cache, value_cache))
            p = torch.cat([torch.arange(*r, device=q.device) for r in ranges])
            t = torch.arange(piece.start, piece.length, device=q.device).unsqueeze(1)
            rows = slice(piece.first, piece.last)
            out[rows] = attend(q[rows], keys, values, (p <= t) & ((p < sink) | (p > t - recent)), scale)
    return out


def kept(start: int, length: int, sink: int, recent: int) -> list[tuple[int, int]]:
    """The ranges of positions, first to last + 1, that queries at positions start .. length - 1 see together."""
    sinks = min(sink, length)
    latest = max(sinks, start - recent + 1 if recent else length)
    return [(first, last) for first, last in ((0, sinks), (latest, length)) if first < last]


def _check(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
    sink: int,
    recent: int,
) -> None:
    check_attention(q, key_cache, value_cache, block_table, query_start, seq_lens, scale)
    if sink < 0:
        refuse("sink", "must not be negative", sink)
    if recent < 0:
        refuse("recent", "must not be negative", recent)
    if sink == recent == 0:
        refuse("recent", "must be positive where sink is 0", recent)


def _fake(
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
    return q.new_empty(*q.shape[:2], value_cache.shape[-1])


def _samples(where: device) -> Iterator[Case]:
    """Qwen3-MoE whole (32 and 4 heads) and the 64 and 4 heads of Qwen3-235B-A22B; blocks cut by both ranges."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    for model, heads, sink, recent in (
        (TINY, TINY.heads, 4, 10),
        (TINY, TINY.heads, 0, 8),
        (TINY, TINY.heads, 3, 0),
        (QWEN3_MOE, QWEN3_MOE.heads, 16, 100),
        (QWEN3_MOE, 64, 128, 128),
    ):
        for batch in SMALL if model is TINY else LARGE:
            paging = batch.paging(generator, where)
            blocks = (batch.num_blocks, batch.block_size, model.kv_heads, model.head_dim)
            for dtype, atol, rtol in tolerances(batch):
                q = normal(generator, where, dtype, batch.tokens, heads, model.head_dim)
                caches = (normal(generator, where, dtype, *blocks), normal(generator, where, dtype, *blocks))
                inputs = (q, *caches, *paging, model.head_dim**-0.5, sink, recent)
                name = case_name("sink_recent_attention", f"{model.name}-{sink}-{recent}", batch, dtype)
                yield Case(name, inputs, atol, rtol)


SINK_RECENT_ATTENTION = declare("sink_recent_attention", _sink_recent_attention, _fake, _check, _samples)
sink_recent_attention = SINK_RECENT_ATTENTION.call

OPS = (SINK_RECENT_ATTENTION,)
