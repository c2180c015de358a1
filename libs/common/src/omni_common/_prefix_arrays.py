"""Memory of the prefix index: making, growing and measuring the arrays its kernels work on."""

import numpy as np

from omni_common import _prefix_kernels as kernels
from omni_common._prefix_kernels import PLANES, Rows, Sets

_LOAD = 0.75
"""Share of a table's slots in use at which it starts to double."""
_LOAD_WHILE_GROWING = 0.85
"""Share of its former slots in use at which it has to be done."""
_CACHE_LINE = 64
_ROW_BYTES = 32
_SPILL_SLOTS = 4096
"""Slots behind the last home slot, because probing does not wrap around."""


def new_rows(log2_slots: int, most_rows: int) -> Rows:
    """A table of this size that can grow until it holds `most_rows`."""
    most = 1 << max(log2_slots, int(most_rows / _LOAD).bit_length())
    spilled = _with_spill(most)
    # Aligned, or every other row would lie across two cache lines. Untouched memory costs nothing.
    memory = np.zeros(spilled * _ROW_BYTES + _CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % _CACHE_LINE
    memory = memory[start : start + spilled * _ROW_BYTES]
    slots = 1 << log2_slots
    meta = np.zeros(kernels.SINK + 1, np.int64)
    meta[kernels.LIMIT] = int(slots * _LOAD)
    meta[kernels.SHIFT] = 64 - log2_slots
    meta[kernels.END] = _with_spill(slots)
    return Rows(memory.view(np.uint64).reshape(-1, 4), memory.view(np.uint32).reshape(-1, 8), meta)


def _with_spill(slots: int) -> int:
    return slots + min(slots, _SPILL_SLOTS)


def start_growth(rows: Rows) -> None:
    """Double the table; `kernels.spread` has to follow, piece by piece, before LIMIT is reached."""
    slots = 1 << 64 - int(rows.meta[kernels.SHIFT])
    assert _with_spill(2 * slots) <= len(rows.words), "more rows than the table was made for"
    rows.meta[kernels.LIMIT] = int(slots * _LOAD_WHILE_GROWING)
    rows.meta[kernels.SHIFT] -= 1
    rows.meta[kernels.EDGE] = slots
    rows.meta[kernels.END] = _with_spill(2 * slots)


def go_on_growing(rows: Rows, num_slots: int) -> None:
    kernels.spread(rows, num_slots)
    if rows.meta[kernels.EDGE] == 0:
        rows.meta[kernels.LIMIT] = int((1 << 64 - int(rows.meta[kernels.SHIFT])) * _LOAD)


def new_sets(ids: int, words: int) -> Sets:
    """Room for `ids` sets (a power of two) over 64 x `words` member bits."""
    return Sets(
        bits=np.zeros((ids, words, PLANES), np.uint64),
        refs=np.zeros(ids, np.uint32),
        hashes=np.zeros(ids, np.uint64),
        by_hash=np.zeros(2 * ids, np.uint32),
        free=np.arange(ids, dtype=np.uint32)[::-1].copy(),
        meta=np.array([ids - 1], np.int64),
        draft=np.zeros((words, PLANES), np.uint64),
    )


def grown_sets(sets: Sets) -> Sets:
    """Room for twice as many sets; called when no id is free."""
    ids, words, _ = sets.bits.shape
    larger = new_sets(2 * ids, words)
    larger.bits[:ids] = sets.bits
    larger.refs[:ids] = sets.refs
    larger.hashes[:ids] = sets.hashes
    larger.meta[0] = ids
    kernels.reindex(larger)
    return larger


def widened_sets(sets: Sets, words: int) -> Sets:
    """The same sets with room for more members; ids and hashes stay."""
    ids, narrow, planes = sets.bits.shape
    bits = np.zeros((ids, words, planes), np.uint64)
    bits[:, :narrow] = sets.bits
    return sets._replace(bits=bits, draft=np.zeros((words, planes), np.uint64))


def rows_bytes(rows: Rows) -> int:
    return int(rows.meta[kernels.END]) * _ROW_BYTES + rows.meta.nbytes


def sets_bytes(sets: Sets) -> int:
    return sum(array.nbytes for array in sets)
