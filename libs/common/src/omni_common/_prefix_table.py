"""The blocks of a prefix index and who holds them, with members as bit numbers: growth, eviction, recycling of bits."""

import heapq
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from omni_common import _prefix_arrays as arrays
from omni_common import _prefix_kernels as kernels
from omni_common._prefix_kernels import COUNT, EDGE, END, HITS, LIMIT, PLACED, POSITION, SET, STAMP, U32, U64, Rows

PAGE_KEYS = 65_536
"""Most that one kernel call changes, and most of one page of `held`."""
_HELD_PLANES = [plane for plane in range(kernels.PLANES) if plane != kernels.EXPECTED]

_GENERATIONS = 256
"""Ages told apart while as many blocks pass as the table may hold."""
_SLACK = 16
"""Of a large table, one part in this many is kept free by evicting ahead of need."""
_PIECEWISE_FROM = 1 << 16
"""Tables of fewer blocks evict only when full, and at once."""
_SWEEP_SLOTS = 512
"""At least this many per change."""
_SPREAD_SLOTS = 512
"""At least this many per change."""
_SPREAD_SLOTS_PER_KEY = 16
"""Growth begins at 75% load and has to be over at 85%: ten would do."""
_SAMPLE_SLOTS = 1 << 15
_SCAN_SLOTS = 1 << 18


class Counts(NamedTuple):
    blocks: int
    entries: int
    bytes: int
    evicted: int
    sets: int


class HotRow(NamedTuple):
    key: bytes
    position: int
    hits: int
    holders: list[int]
    """Member bits."""


class BlockTable:
    def __init__(self, max_blocks: int, max_marks: int) -> None:
        self._max_blocks = max_blocks
        piecewise = max_blocks >= _PIECEWISE_FROM
        slack = max_blocks // _SLACK
        self._evict_above = max_blocks - slack if piecewise else max_blocks
        self._evict_to = max_blocks - 3 * slack if piecewise else max_blocks - slack
        self._rows = arrays.new_rows(10, max_blocks + max(PAGE_KEYS, max_marks))
        self._marks = arrays.new_rows(6, 2 * max_marks)
        self._sets = arrays.new_sets(64, 1)
        self._touched = 0
        self._growths = 0
        self._alive = np.zeros(1, np.uint64)
        self._dead = np.zeros(1, np.uint64)
        self._num_dead = 0
        self._free_bits = list(range(64))
        # A sweep under way: its next slot (or -1), whom it takes out, and what it evicts as of which stamp.
        self._sweep_at = -1
        self._sweep_dead = self._dead
        self._sweep_oldest = int(kernels.NEVER)
        self._sweep_stamp = 0
        self._sweep_placed = 0

    # Members

    @property
    def words(self) -> int:
        """64 member bits each."""
        return len(self._alive)

    def take_bit(self) -> int:
        """A bit that no row knows."""
        if not self._free_bits and self._num_dead >= 64:
            for _ in range(2):  # a sweep under way knows nothing of those that died since it began
                self._finish_sweep()
        if not self._free_bits:
            words = self.words
            self._sets = arrays.widened_sets(self._sets, words + 1)
            self._alive, self._dead, self._sweep_dead = (
                np.append(bits, np.uint64(0)) for bits in (self._alive, self._dead, self._sweep_dead)
            )
            self._free_bits = list(range(64 * words, 64 * words + 64))
        bit = heapq.heappop(self._free_bits)
        self._alive[bit >> 6] |= _mask(bit)
        return bit

    def bury(self, bit: int) -> None:
        """The member is gone; rows are swept by and by, then the bit is free again."""
        self._alive[bit >> 6] &= ~_mask(bit)
        self._dead[bit >> 6] |= _mask(bit)
        self._num_dead += 1

    # Changes

    def update(self, keys: U64, positions: U32, bit: int, salt: int, gained: int, lost: int) -> None:
        """The member gains and loses planes (bit masks) on these blocks. `positions`: one per key, or the first."""
        for begin in range(0, len(keys), PAGE_KEYS):
            page = keys[begin : begin + PAGE_KEYS]
            at = positions[begin : begin + PAGE_KEYS] if len(positions) > 1 else positions + np.uint32(begin)
            stamp, done = self._stamp(len(page)), 0
            while done < len(page):
                done = kernels.update(
                    self._rows, self._sets, self._marks, page, at, done, bit, salt, gained, lost, stamp
                )
                if done < len(page):
                    self._grow()
            self.maintain(len(page))

    def expect(self, keys: U64, bit: int, salt: int, serial: int) -> U64:
        """Mark the blocks as coming; returns the keys marked, which are those the member does not hold in hbm."""
        stamp, done = self._stamp(len(keys)), 0
        marked = np.zeros((len(keys) + 1, 2), np.uint64)
        while done < len(keys):
            done = kernels.expect(self._rows, self._sets, self._marks, keys, done, bit, salt, serial, stamp, marked)
            if done < len(keys):
                self._grow()
        self.maintain(len(keys))
        return marked[1 : 1 + int(marked[0, 0])].copy()

    def expire(self, keys: U64, bit: int, salt: int, serial: int) -> None:
        """End the marks of this serial. A negative `bit`: the member is gone."""
        done = 0
        while done < len(keys):
            done = kernels.expire(self._rows, self._sets, self._marks, keys, done, bit, salt, serial)
            if done < len(keys):
                self._grow()

    @property
    def num_marks(self) -> int:
        return int(self._marks.meta[COUNT])

    def _stamp(self, num_keys: int) -> int:
        """Coarse time of use: moves on after as many keys as make one generation."""
        self._touched += num_keys
        return self._touched // max(1, self._max_blocks // _GENERATIONS) & 0xFFFFFFFF

    def _grow(self) -> None:
        """Whatever is full."""
        if self._sets.meta[0] == 0:
            self._sets = arrays.grown_sets(self._sets)
        for table in (self._rows, self._marks):
            if table.meta[COUNT] >= table.meta[LIMIT]:
                if table.meta[EDGE] > 0:
                    self._spread(table, int(table.meta[EDGE]))
                else:
                    arrays.start_growth(table)

    def _spread(self, table: Rows, num_slots: int) -> None:
        arrays.go_on_growing(table, num_slots)
        if table is self._rows:
            self._growths += 1
            if self._sweep_at >= 0:  # rows have moved up, perhaps past it
                self._sweep_at = int(table.meta[END]) - 1

    # Upkeep

    def maintain(self, num_keys: int) -> None:
        """After a change by `num_keys`: pieces of growing and sweeping, large enough that both end in time."""
        rows, marks = self._rows.meta.data, self._marks.meta.data
        sweeping = self._sweep_at >= 0 or self._num_dead > 0 or rows[COUNT] > self._evict_above
        if not (sweeping or rows[EDGE] or marks[EDGE]):
            return
        for table in (self._rows, self._marks):
            if table.meta[EDGE] > 0:
                self._spread(table, _SPREAD_SLOTS + num_keys * _SPREAD_SLOTS_PER_KEY)
        if not sweeping:
            return
        evicting = self._sweep_oldest < kernels.NEVER
        if self._sweep_at < 0 or (rows[COUNT] > self._evict_above and not evicting):
            self._begin_sweep()
        per_key = 1
        if self._sweep_oldest < kernels.NEVER:  # done before the table is full
            per_key += self._sweep_at // max(1, self._max_blocks - rows[COUNT])
        self._advance_sweep(_SWEEP_SLOTS + num_keys * (per_key + 1))
        while rows[COUNT] > self._max_blocks:
            self._finish_sweep()

    def _begin_sweep(self) -> None:
        self._sweep_at = int(self._rows.meta[END]) - 1
        self._sweep_placed = int(self._rows.meta[PLACED])
        self._sweep_dead = self._dead.copy()
        self._sweep_stamp = self._stamp(0)
        self._sweep_oldest = int(kernels.NEVER)
        if self._rows.meta[COUNT] > self._evict_above:
            self._sweep_oldest = self._age_to_evict()

    def _age_to_evict(self) -> int:
        """Least age, as the kernel counts it, of the blocks that are one too many, judged by a sample of slots."""
        count, end = int(self._rows.meta[COUNT]), int(self._rows.meta[END])
        every = end // _SAMPLE_SLOTS + 1 if count > _SAMPLE_SLOTS else 1
        slots = self._rows.fields[:end:every]
        slots = slots[slots[:, SET] != 0]
        ages = (np.uint32(self._sweep_stamp) - slots[:, STAMP]).astype(np.uint64) << np.uint64(32)
        ages |= slots[:, POSITION]
        kept = len(ages) * self._evict_to // count
        return int(np.partition(ages, kept)[kept])

    def _advance_sweep(self, num_slots: int) -> None:
        placed = int(self._rows.meta[PLACED])
        passed_by = placed - self._sweep_placed  # each row placed may have moved another one up, past the sweep
        self._sweep_at = min(self._sweep_at + passed_by, int(self._rows.meta[END]) - 1)
        self._sweep_placed = placed
        stop = max(0, self._sweep_at + 1 - num_slots)
        oldest, stamp = self._sweep_oldest, self._stamp(0)
        if oldest < kernels.NEVER:
            oldest += ((stamp - self._sweep_stamp) & 0xFFFFFFFF) << 32
            oldest = min(oldest, int(kernels.NEVER))
        while self._sweep_at >= stop:
            self._sweep_at = kernels.sweep(
                self._rows, self._sets, self._sweep_at, stop, self._sweep_dead, np.uint64(oldest), stamp
            )
            if self._sweep_at >= stop:
                self._sets = arrays.grown_sets(self._sets)
        if self._sweep_at < 0:
            self._dead &= ~self._sweep_dead
            for bit in _bit_numbers(self._sweep_dead):
                heapq.heappush(self._free_bits, bit)
                self._num_dead -= 1

    def _finish_sweep(self) -> None:
        if self._rows.meta[EDGE] > 0:
            self._spread(self._rows, int(self._rows.meta[EDGE]))
        if self._sweep_at < 0 or (self._sweep_oldest == kernels.NEVER and self._rows.meta[COUNT] > self._max_blocks):
            self._begin_sweep()
        self._advance_sweep(int(self._rows.meta[END]))

    # Questions

    def lookup(
        self, keys: U64, sources: npt.NDArray[np.int64], workers: U64
    ) -> tuple[int, list[int], npt.NDArray[np.uint32]]:
        """Longest prefix of all, per tier of pools alone, per tier of each bit. See `kernels.lookup`."""
        standing = np.repeat(workers[:, np.newaxis], len(sources), axis=1)
        pooled = np.full(len(sources), kernels.NOWHERE, np.uint32)
        depths = np.zeros((64 * self.words, len(sources)), np.uint32)
        stamp = self._stamp(len(keys))
        walked = kernels.lookup(self._rows, self._sets, keys, sources, standing, pooled, depths, stamp)
        return walked, pooled.tolist(), depths

    def held(self, bit: int, plane: int) -> Iterator[tuple[bytes, U32]]:
        """Keys and positions in pages, a stretch of slots at a time as it is then. Rows moving up begin it anew."""
        rows, growths, stop = self._rows, self._growths, int(self._rows.meta[END])
        while stop > 0:
            start, placed = max(0, stop - _SCAN_SLOTS), int(rows.meta[PLACED])
            holds = np.asarray(self._sets.bits[:, bit >> 6, plane] & _mask(bit) != 0)
            here = start + np.flatnonzero(holds[rows.fields[start:stop, SET]])
            keys, positions = rows.words[here, :2], rows.fields[here, POSITION]
            for begin in range(0, len(here), PAGE_KEYS):
                page = slice(begin, begin + PAGE_KEYS)
                yield keys[page].tobytes(), positions[page]
            stop = start + int(rows.meta[PLACED]) - placed  # as in a sweep
            if growths != self._growths or stop > rows.meta[END]:
                growths, stop = self._growths, int(rows.meta[END])

    def counts(self) -> Counts:
        blocks = entries = 0
        used = np.flatnonzero(self._sets.refs)
        for part in np.array_split(used, len(used) // PAGE_KEYS + 1):
            refs = self._sets.refs[part].astype(np.int64)
            alive = self._sets.bits[part] & self._alive[:, np.newaxis]
            blocks += int(refs[alive.any(axis=(1, 2))].sum())
            held = np.bitwise_or.reduce(alive[:, :, _HELD_PLANES], axis=2)
            entries += int((np.bitwise_count(held).sum(axis=1, dtype=np.int64) * refs).sum())
        size = arrays.rows_bytes(self._rows) + arrays.rows_bytes(self._marks) + arrays.sets_bytes(self._sets)
        return Counts(blocks, entries, size, int(self._rows.meta[kernels.EVICTED]), len(used))

    def hottest(self, limit: int) -> list[HotRow]:
        """Blocks on which most lookups ended, among those somebody holds."""
        live = np.any(self._sets.bits & self._alive[:, np.newaxis], axis=(1, 2))
        best = np.zeros(0, np.int64)
        for start in range(0, int(self._rows.meta[END]), _SCAN_SLOTS):
            fields = self._rows.fields[start : start + _SCAN_SLOTS]
            hit = np.flatnonzero(live.take(fields[:, SET]) & (fields[:, HITS] != 0))
            best = np.concatenate([best, start + hit])
            best = best[np.argsort(-self._rows.fields[best, HITS].astype(np.int64), kind="stable")[:limit]]
        return [self._hot_row(slot) for slot in best.tolist()]

    def _hot_row(self, slot: int) -> HotRow:
        fields = self._rows.fields[slot].tolist()
        holders = np.bitwise_or.reduce(self._sets.bits[fields[SET]], axis=1) & self._alive
        return HotRow(self._rows.words[slot, :2].tobytes(), fields[POSITION], fields[HITS], _bit_numbers(holders))


def _mask(bit: int) -> np.uint64:
    return np.uint64(1 << (bit & 63))


def _bit_numbers(words: U64) -> list[int]:
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()  # type: ignore[no-any-return]
