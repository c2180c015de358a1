"""Which members hold which prefix blocks, on which medium: the longest prefix of a prompt for all of them at once.

A member is one epoch of a worker, or a pool that every worker can load from. Each block is a row of a hash table; its
holders are an interned set of member bits, so blocks with the same holders share one set and a lookup works only where
the set changes along the prompt. Loops are compiled (`_prefix_kernels`); `warm_up` does that ahead of traffic.

One owner, one thread: nothing here locks.
"""

import heapq
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from omni_common._prefix_kernels import EXPECTED, U32, U64
from omni_common._prefix_table import BlockTable
from omni_common.blocks import KEY_BYTES

HBM, HOST, DISK, REMOTE = 1, 2, 3, 4
"""Media, numbered as omni.kv.v1.Medium."""
_PLANES = {HBM: 0, HOST: 2, DISK: 3, REMOTE: 4}
_OWN_TIERS = (("hbm", HBM, 0), ("expected", HBM, 1), ("host", HOST, 2), ("disk", DISK, 3), ("remote", REMOTE, 4))
_EXPECTED = 1 << EXPECTED
_NO_POSITIONS = np.zeros(1, np.uint32)


class Tier(NamedTuple):
    """Where blocks may come from: "hbm", "expected", "host", "disk", "remote", or "pool:<id>" (`pool` is its id)."""

    name: str
    medium: int
    pool: str


class HotPrefix(NamedTuple):
    key: bytes
    """Of its last block."""
    blocks: int
    hits: int
    """Lookups whose known prefix ended there."""
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    blocks: int
    """Held or expected by somebody."""
    entries: int
    """Pairs of a block and a member that holds it, on however many media; expected ones are not counted."""
    bytes: int
    capacity_blocks: int
    evicted_blocks: int
    """Since the start."""
    holder_sets: int


@dataclass(frozen=True, slots=True)
class _Member:
    bit: int
    salt: int
    """Keeps expectations of an earlier owner of the bit apart."""
    pool_medium: int | None


class _Expectation(NamedTuple):
    ends_s: float
    serial: int
    member: str
    holder: _Member
    keys: U64


class Prefixes:
    """Answer to one lookup; later changes of the index do not touch it."""

    def __init__(
        self, num_blocks: int, longest: int, tiers: tuple[Tier, ...], pooled: Sequence[int], workers: Mapping[str, int],
        depths: U32,
    ) -> None:  # fmt: skip
        """`depths`: blocks by bit and tier; `workers` names their bits; `pooled`: blocks by tier that pools give."""
        self.num_blocks = num_blocks
        self.tiers = tiers
        self._longest = longest
        self._pooled = tuple(pooled)
        self._workers = workers
        self._depths = depths
        self._listed: list[list[int]] = []

    def of(self, member: str) -> tuple[int, ...]:
        """Blocks from the start of the prompt that `member` has on each tier or an earlier one."""
        bit = self._workers.get(member)
        if bit is None or not self._longest:
            return self._pooled
        # Made when first asked for: a list is read faster than an array.
        self._listed = self._listed or self._depths.tolist()
        return tuple(self._listed[bit])

    def matrix(self, members: Sequence[str]) -> NDArray[np.int64]:
        """As `of`, of many members: members x tiers."""
        bits = np.array([self._workers.get(member, -1) for member in members], np.intp)
        result = np.empty((len(bits), len(self._pooled)), np.int64)
        result[:] = self._pooled
        if self._longest:
            known = bits >= 0
            result[known] = self._depths[bits[known]]
        return result

    def longest(self) -> int:
        """Blocks that some member, or pools, have on any tier."""
        return self._longest

    def rows(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Workers whose own blocks add to what pools give; then "" for all others, where pools give anything."""
        if self._longest:
            of_workers = self._depths[list(self._workers.values())]
            is_adding = (of_workers != np.array(self._pooled, np.uint32)).any(axis=1)
            for worker, adds, depths in zip(self._workers, is_adding.tolist(), of_workers.tolist(), strict=True):
                if adds:
                    yield worker, tuple(depths)
        if any(self._pooled):
            yield "", self._pooled


class PrefixIndex:
    """At most `max_blocks`; evicts the least recently stored or looked up, of equal age the deepest in their prompt.

    Methods raise ValueError for malformed keys, positions or media.
    """

    def __init__(self, *, max_blocks: int, clock: Callable[[], float] = time.monotonic) -> None:
        if max_blocks < 1:
            raise ValueError(f"max_blocks must be at least 1, not {max_blocks}")
        self._max_blocks = max_blocks
        self._max_expected = max(1024, max_blocks // 8)
        self._clock = clock
        self._table = BlockTable(max_blocks, self._max_expected)
        self._members: dict[str, _Member] = {}
        self._births = itertools.count(1)
        self._serials = itertools.count(1)
        self._expectations: list[_Expectation] = []
        self._expectation_bytes = 0
        self._stale = True

    @property
    def members(self) -> Sequence[str]:
        return tuple(self._members)

    def join(self, member: str, *, pool_medium: int | None = None) -> None:
        """Make a worker, or with `pool_medium` a pool, known. A known member of another kind starts empty again."""
        if pool_medium not in (None, HOST, DISK, REMOTE):
            raise ValueError(f"a pool is of host, disk or remote, not of medium {pool_medium}")
        known = self._members.get(member)
        if known is not None and known.pool_medium == pool_medium:
            return
        self.leave(member)
        self._members[member] = self._born(pool_medium)
        self._stale = True

    def leave(self, member: str) -> None:
        """Forget a member and all it holds, at once; unknown ones are ignored."""
        known = self._members.pop(member, None)
        if known is not None:
            self._table.bury(known.bit)
            self._stale = True
            self._table.maintain(0)

    def store(self, member: str, medium: int, keys: bytes, positions: Sequence[int] | U32) -> None:
        """The member holds these blocks on `medium`. `positions`: one per key, or the first of consecutive ones.

        Raises KeyError for a member that never joined.
        """
        lost = _EXPECTED if medium == HBM else 0
        self._update(self._members[member], keys, np.asarray(positions, np.uint32), 1 << _plane(medium), lost)

    def remove(self, member: str, medium: int, keys: bytes) -> None:
        """The member holds these blocks on `medium` no more; those gone from hbm are not expected either.

        Raises KeyError for a member that never joined.
        """
        lost = 1 << _plane(medium) | (_EXPECTED if medium == HBM else 0)
        self._update(self._members[member], keys, _NO_POSITIONS, 0, lost)

    def clear(self, member: str) -> None:
        """The member holds nothing any more. Raises KeyError for one that never joined."""
        known = self._members[member]
        self._table.bury(known.bit)
        self._members[member] = self._born(known.pool_medium)
        self._stale = True
        self._table.maintain(0)

    def expect(self, member: str, keys: bytes, ttl_s: float) -> None:
        """The blocks of a prompt, from its first, are about to be stored in the member's hbm.

        Ends after `ttl_s` unless confirmed, withdrawn or expected anew. Unknown members and pools are ignored.
        """
        words = _words(keys)[: self._max_expected]
        now_s = self._expire()
        known = self._members.get(member)
        if known is None or known.pool_medium is not None:
            return
        serial = next(self._serials) & 0xFFFFFFFF
        marked = self._table.expect(words, known.bit, known.salt, serial)
        if len(marked):
            heapq.heappush(self._expectations, _Expectation(now_s + ttl_s, serial, member, known, marked))
            self._expectation_bytes += marked.nbytes
        while self._table.num_marks > self._max_expected:
            self._end_next_expectation()

    def withdraw(self, member: str, keys: bytes) -> None:
        """These blocks are no longer expected of the member; unknown members are ignored."""
        known = self._members.get(member)
        if known is not None:
            self._update(known, keys, _NO_POSITIONS, 0, _EXPECTED)

    def lookup(self, keys: bytes) -> Prefixes:
        """Longest known prefixes of a prompt; counts as a use of the longest of them."""
        words = _words(keys)
        self._expire()
        if self._stale:
            self._refresh()
        longest, pooled, depths = self._table.lookup(words, self._sources, self._worker_words)
        return Prefixes(len(words), longest, self._tiers, pooled, self._worker_bits, depths)

    def held(self, member: str) -> Iterator[tuple[int, bytes, U32]]:
        """Medium, keys and positions of what the member holds, in no order, in pages of at most 65,536 keys.

        Between pages the index may change: what is held all the while is told, some of it perhaps twice; what came
        or went meanwhile may be told or not. Ends early when the member leaves or is cleared.
        Raises KeyError for one that never joined.
        """
        known = self._members[member]
        for medium, plane in _PLANES.items():
            for page, positions in self._table.held(known.bit, plane):
                if self._members.get(member) is not known:
                    return
                yield medium, page, positions

    def usage(self) -> Usage:
        counts = self._table.counts()
        size = counts.bytes + self._expectation_bytes
        return Usage(counts.blocks, counts.entries, size, self._max_blocks, counts.evicted, counts.sets)

    def hottest(self, limit: int) -> list[HotPrefix]:
        """Prefixes at which most lookups ended, hottest first. Reads the whole table."""
        names = {member.bit: name for name, member in self._members.items()}
        return [
            HotPrefix(row.key, row.position + 1, row.hits, tuple(sorted(names[bit] for bit in row.holders)))
            for row in self._table.hottest(limit)
        ]

    def _update(self, member: _Member, keys: bytes, positions: U32, gained: int, lost: int) -> None:
        words = _words(keys)
        if len(positions) not in (1, len(words)):
            raise ValueError(f"{len(positions)} positions for {len(words)} keys")
        self._expire()
        self._table.update(words, positions, member.bit, member.salt, gained, lost)

    def _expire(self) -> float:
        """End what is expected no longer; returns the time."""
        now_s = self._clock()
        while self._expectations and self._expectations[0].ends_s <= now_s:
            self._end_next_expectation()
        return now_s

    def _end_next_expectation(self) -> None:
        ended = heapq.heappop(self._expectations)
        self._expectation_bytes -= ended.keys.nbytes
        alive = self._members.get(ended.member) is ended.holder
        self._table.expire(ended.keys, ended.holder.bit if alive else -1, ended.holder.salt, ended.serial)

    def _born(self, pool_medium: int | None) -> _Member:
        salt = next(self._births) * 0x9E3779B97F4A7C15 & 0x7FFFFFFFFFFFFFFF
        return _Member(self._table.take_bit(), salt, pool_medium)

    def _refresh(self) -> None:
        """Make anew what lookups need of the members."""
        self._stale = False
        pools = sorted((m.pool_medium, name) for name, m in self._members.items() if m.pool_medium is not None)
        tiers: list[Tier] = []
        sources: list[tuple[int, int]] = []
        for name, medium, plane in _OWN_TIERS:
            tiers.append(Tier(name, medium, ""))
            sources.append((plane, -1))
            if name != "expected":
                tiers += [Tier(f"pool:{pool}", medium, pool) for of, pool in pools if of == medium]
                sources += [(-1, self._members[pool].bit) for of, pool in pools if of == medium]
        self._tiers = tuple(tiers)
        self._sources = np.array(sources, np.int64)
        # Made anew and never changed: answers given out refer to it.
        self._worker_bits = {name: m.bit for name, m in self._members.items() if m.pool_medium is None}
        self._worker_words = np.zeros(self._table.words, np.uint64)
        for bit in self._worker_bits.values():
            self._worker_words[bit >> 6] |= np.uint64(1 << (bit & 63))


def _plane(medium: int) -> int:
    plane = _PLANES.get(medium)
    if plane is None:
        raise ValueError(f"medium must be one of {tuple(_PLANES)}, not {medium}")
    return plane


def _words(keys: bytes) -> U64:
    """keys x 2, sharing the memory of `keys`."""
    if len(keys) % KEY_BYTES:
        raise ValueError(f"keys are {KEY_BYTES} bytes each, {len(keys)} bytes are no whole number of them")
    return np.frombuffer(keys, np.uint64).reshape(-1, 2)


def warm_up() -> None:
    """Compile or load the kernels: seconds on a machine's first start, less after that."""
    keys = np.arange(2 * 1024, dtype=np.uint64).tobytes()
    index = PrefixIndex(max_blocks=1024, clock=lambda: 0.0)
    for number in range(65):  # as many holder sets and blocks as make the first arrays grow
        worker = f"worker-{number}"
        index.join(worker)
        index.store(worker, HBM, keys[number * KEY_BYTES :][:KEY_BYTES], (0,))
    index.store(worker, HBM, keys, (0,))
    index.lookup(keys)
    index.remove(worker, HBM, keys)
    index.expect(worker, keys[:KEY_BYTES], 0.0)
    index.lookup(keys)
    index.leave(worker)
