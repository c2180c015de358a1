"""KV caches cut into blocks: who sits where, and what the attention ops ask of the tensors that say so.

Sequence s of a batch owns query rows query_start[s] .. query_start[s + 1] - 1, the newest of its seq_lens[s] tokens;
its position p lies in block block_table[s, p // B] at row p % B. Table entries behind the last used block mean nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

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

_SCORES = 1 << 24
"""Attention scores held at a time by a meaning, 64 MiB in float32."""


@dataclass(frozen=True, slots=True)
class Span:
    """Query rows first .. last - 1, of sequence `row` of the table, which has `length` tokens."""

    row: int
    first: int
    last: int
    length: int

    @property
    def start(self) -> int:
        """Position of the first query row."""
        return self.length - (self.last - self.first)

    def pieces(self, rows: int) -> Iterator["Span"]:
        """The same rows, at most `rows` at a time; the length of a piece ends at its last row."""
        for first in range(self.first, self.last, rows):
            last = min(first + rows, self.last)
            yield Span(self.row, first, last, self.length - (self.last - last))


def spans(query_start: Tensor, seq_lens: Tensor) -> list[Span]:
    """The sequences that have query rows. Reads both tensors on the host."""
    starts = query_start.tolist()
    return [
        Span(row, starts[row], starts[row + 1], length)
        for row, length in enumerate(seq_lens.tolist())
        if starts[row + 1] > starts[row]
    ]


def gather(cache: Tensor, table: Tensor, first: int, last: int) -> Tensor:
    """Positions first .. last - 1 of one sequence, whose row of the block table is `table`: (last - first, ...)."""
    size = cache.shape[1]
    begin = first // size
    blocks = cache.index_select(0, table[begin : -(-last // size)])
    return blocks.flatten(0, 1)[first - begin * size : last - begin * size]


def attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attention of q (Q, Hq, D) over keys (L, Hkv, D) and values (L, Hkv, Dv) where `seen` (Q, L): (Q, Hq, Dv), wide.

    Query head h reads key head h // (Hq / Hkv). Computes in float32 (float64 for float64).
    """
    rows, heads, _ = q.shape
    groups = keys.shape[1]
    grouped = wide(q).unflatten(1, (groups, heads // groups))
    scores = torch.einsum("qghd,lgd->ghql", grouped, wide(keys)) * scale
    weights = scores.masked_fill_(~seen, float("-inf")).softmax(-1)
    return torch.einsum("ghql,lgd->qghd", weights, wide(values)).reshape(rows, heads, values.shape[-1])


def rows_at_a_time(heads: int, length: int) -> int:
    """How many query rows of `heads` heads a meaning may attend over `length` tokens at once."""
    return max(1, _SCORES // (heads * length))


def check_cache(argument: str, cache: Tensor, dims: int) -> None:
    """A cache may be a view with gaps between its blocks, tokens or heads, as long as the last dimension has none."""
    has_dims(argument, cache, dims)
    if cache.shape[1] == 0 or cache.shape[-1] == 0:
        refuse(argument, "blocks must not be empty", tuple(cache.shape))
    has_unit_stride(argument, cache)


def check_queries(argument: str, q: Tensor, cache_name: str, cache: Tensor) -> None:
    """`q` (T, heads, size) is contiguous, and of the dtype and device of the cache it reads."""
    has_dims(argument, q, 3)
    has_dtype(argument, q, *FLOATS)
    is_contiguous(argument, q)
    if q.shape[1] == 0:
        refuse(argument, "must have at least one head", tuple(q.shape))
    has_dtype(cache_name, cache, q.dtype)
    on_device_of(cache_name, cache, q)


def check_paging(tokens: int, cache: Tensor, block_table: Tensor, query_start: Tensor, seq_lens: Tensor) -> None:
    """Check block_table int32 (S, MB), query_start int32 (S + 1) and seq_lens int32 (S) against T = `tokens` rows.

    block_table lies with the cache; query_start and seq_lens may lie on the host, where kernels read them.
    What the tensors hold is checked where reading it costs no synchronisation: on the CPU, outside of tracing.
    """
    has_dims("block_table", block_table, 2)
    sequences = block_table.shape[0]
    has_shape("query_start", query_start, (sequences + 1,))
    has_shape("seq_lens", seq_lens, (sequences,))
    for name, table in (("block_table", block_table), ("query_start", query_start), ("seq_lens", seq_lens)):
        has_dtype(name, table, torch.int32)
    on_device_of("block_table", block_table, cache)
    if known(query_start) and known(seq_lens):
        _check_lengths(tokens, cache.shape[1], block_table.shape[1], query_start.tolist(), seq_lens.tolist())
    if known(block_table) and known(seq_lens):
        _check_table(cache, block_table, seq_lens)


def known(x: Tensor) -> bool:
    """Whether what `x` holds can be read at no cost: a real tensor on the CPU."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_lengths(tokens: int, size: int, blocks: int, starts: list[int], lengths: list[int]) -> None:
    if starts[0] != 0 or starts[-1] != tokens:
        refuse("query_start", f"must run from 0 to {tokens}, the number of query rows", f"{starts[0]} to {starts[-1]}")
    for row, length in enumerate(lengths):
        rows = starts[row + 1] - starts[row]
        if rows < 0:
            refuse("query_start", "must not fall", f"{starts[row]}, {starts[row + 1]} at {row}")
        if length < rows:
            refuse("seq_lens", f"must count the {rows} query rows of sequence {row}", length)
        if length > blocks * size:
            refuse("block_table", f"must have {-(-length // size)} columns for the {length} tokens of {row}", blocks)


def _check_table(cache: Tensor, block_table: Tensor, seq_lens: Tensor) -> None:
    if block_table.numel() == 0 or _edges_within(block_table, cache.shape[0]):
        return
    size = cache.shape[1]
    used = torch.arange(0, block_table.shape[1] * size, size) < seq_lens.unsqueeze(1)
    named = torch.where(used, block_table, 0)
    if not _edges_within(named, cache.shape[0]):
        edges = f"{int(named.min())} to {int(named.max())}"
        refuse("block_table", f"used entries must be from 0 to {cache.shape[0] - 1}", edges)


def _edges_within(table: Tensor, count: int) -> bool:
    lowest, highest = table.aminmax()
    return int(lowest) >= 0 and int(highest) < count
