"""Paged attention on the CPU, full and to sink and recent tokens: blocks copied together, then torch's flash attention.

Latent attention has no kernel here: its meaning, two matrix products in float32 for all heads at once, is as fast as
what torch offers, and as vLLM's own CPU decode.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from omni_kernels.ops.paging import Span, gather, spans
from omni_kernels.ops.sink_recent_attention import kept

_MASKED = 1 << 24
"""Entries of a mask, or scores, held at a time."""
_ROWS = 128


def _paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    out = q.new_empty(*q.shape[:2], value_cache.shape[-1])
    is_flash = value_cache.shape[-1] == q.shape[2]  # torch's flash attention wants one size; else scores are held
    for span in spans(query_start, seq_lens):
        keys = gather(key_cache, block_table[span.row], 0, span.length)
        values = gather(value_cache, block_table[span.row], 0, span.length)
        if span.start == 0 and is_flash:
            rows = slice(span.first, span.last)
            out[rows] = _attend(q[rows], keys, values, scale, is_causal=True)
            continue
        for piece in span.pieces(max(1, _MASKED // (span.length if is_flash else span.length * q.shape[1]))):
            rows = slice(piece.first, piece.last)
            seen = torch.ones(piece.last - piece.first, piece.length, dtype=torch.bool).tril_(piece.start)
            out[rows] = _attend(q[rows], keys[: piece.length], values[: piece.length], scale, seen)
    return out


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
    out = q.new_empty(*q.shape[:2], value_cache.shape[-1])
    for span in spans(query_start, seq_lens):
        table = block_table[span.row]
        for piece in span.pieces(_ROWS):
            ranges = kept(piece.start, piece.length, sink, recent)
            keys, values = (torch.cat([gather(c, table, *r) for r in ranges]) for c in (key_cache, value_cache))
            rows = slice(piece.first, piece.last)
            out[rows] = _attend(q[rows], keys, values, scale, _seen(piece, ranges, sink, recent))
    return out


def _seen(piece: Span, ranges: list[tuple[int, int]], sink: int, recent: int) -> Tensor | None:
    if piece.last - piece.first == 1:
        return None
    p = torch.cat([torch.arange(*r) for r in ranges])
    t = torch.arange(piece.start, piece.length).unsqueeze(1)
    return (p <= t) & ((p < sink) | (p > t - recent))


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, seen: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Attention of q (Q, Hq, D) over keys (L, Hkv, D) and values (L, Hkv, Dv): (Q, Hq, Dv).

    A single row sees all keys; it is taken as one head for each group, the query heads of the group being its rows.
    """
    by_head = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
    if len(q) == 1:
        heads = q.unflatten(1, (keys.shape[1], -1))
        return scaled_dot_product_attention(heads, *by_head, scale=scale).flatten(1, 2)
    attended = scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0), *by_head, attn_mask=seen, is_causal=is_causal, scale=scale, enable_gqa=True
    )
    return attended.squeeze(0).transpose(0, 1)


KERNELS: Mapping[str, Callable[..., Any]] = {
    "paged_attention": _paged_attention,
    "sink_recent_attention": _sink_recent_attention,
}
