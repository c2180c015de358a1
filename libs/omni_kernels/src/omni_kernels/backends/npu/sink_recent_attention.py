"""Attention to sink and recent tokens on Ascend.

The kept tokens of each query row are copied out and attended to by the fused call, one row a sequence: exact for any
`sink` and `recent`, whole blocks or not, at a cost of sink + recent tokens a row. A decoder that keeps whole blocks
does without the copy: `compact_blocks` and `paged_attention`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from omni_kernels.backends.npu.fused_attention import MAX_SEQUENCES, check_grouped, grouped
from omni_kernels.ops.paging import Span, spans

_BLOCK = 128
_COPIED = 1 << 27
"""Numbers of keys copied at a time, 256 MiB."""


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
    check_grouped(q, key_cache, value_cache)
    out = torch.empty_like(q)
    rows = [row for span in spans(query_start, seq_lens) for row in span.pieces(1)]
    if not rows:
        return out
    longest = -(-min(sink + recent, max(row.length for row in rows)) // _BLOCK) * _BLOCK
    at_once = min(MAX_SEQUENCES, max(1, _COPIED // (longest * key_cache.shape[2] * key_cache.shape[3])))
    for first in range(0, len(rows), at_once):
        chunk = rows[first : first + at_once]
        slots = _slots(chunk, block_table, key_cache.shape[1], sink, recent, longest)
        keys, values = (_copied(cache, slots) for cache in (key_cache, value_cache))
        table = torch.arange(keys.shape[0], dtype=torch.int32, device=q.device).view(len(chunk), -1)
        kept = [Span(i, i, i + 1, min(row.length, sink + recent)) for i, row in enumerate(chunk)]
        here = slice(chunk[0].first, chunk[-1].last)
        out[here] = grouped(q[here], keys, values, table, kept, scale)
    return out


def _slots(rows: list[Span], block_table: Tensor, size: int, sink: int, recent: int, longest: int) -> Tensor:
    """Where the tokens that each row keeps lie, sinks first: (rows, longest), the last one again behind the last."""
    where = block_table.device
    lengths = torch.tensor([row.length for row in rows], device=where).unsqueeze(1)
    table = block_table[torch.tensor([row.row for row in rows], device=where)].long()
    columns = torch.arange(longest, device=where)
    skipped = (lengths - (sink + recent)).clamp_(min=0)
    p = torch.where(columns < sink, columns, columns + skipped)
    p = torch.minimum(p, lengths - 1 if recent else (lengths - 1).clamp(max=sink - 1))
    return table.gather(1, p // size) * size + p % size


def _copied(cache: Tensor, slots: Tensor) -> Tensor:
    """A cache in blocks of 128 of the tokens in `slots`."""
    block, row = slots.flatten() // cache.shape[1], slots.flatten() % cache.shape[1]
    return cache[block, row].view(-1, _BLOCK, *cache.shape[2:])


KERNELS: Mapping[str, Callable[..., Any]] = {"sink_recent_attention": _sink_recent_attention}
