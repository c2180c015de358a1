"""Which worker holds which blocks, as this proxy knows it: a copy of the kvstore's index, and its own dispatches.

    snapshot ... pages ... complete     into a copy of its own, which then replaces the current one
    deltas                              into the current copy
    dispatch, answer                    expected blocks; stored ones where nobody reports for the worker

While the kvstore is away the last copy stays, with an age.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from omni_common.blocks import KEY_BYTES
from omni_common.prefix_index import Prefixes, PrefixIndex, Usage
from omni_proxy.marks import Mark, Marks
from omni_proxy.metrics import PrefixMetrics
from omni_proxy.scheduling.forecast import LoadCost

_HBM = 1
_SLICE_BLOCKS = 4096
"""Blocks applied before others get their turn."""


class Action(StrEnum):
    STORED = "stored"
    REMOVED = "removed"
    CLEARED = "cleared"


class Position(NamedTuple):
    """A point of the kvstore's stream of changes."""

    dataset: str
    event: int


@dataclass(frozen=True, slots=True)
class Holder:
    """Whoever can hold blocks: one epoch of a worker, or with `medium` and `cost` set a pool of blocks."""

    id: str
    epoch: int
    medium: int | None = None
    cost: LoadCost | None = None


@dataclass(frozen=True, slots=True)
class BlockChange:
    """`positions`: one for every key, or that of the first where they follow each other."""

    holder_id: str
    epoch: int
    action: Action
    medium: int
    keys: bytes
    positions: Sequence[int]


@dataclass(slots=True)
class _Known:
    holder: Holder
    is_reported: bool


@dataclass(slots=True)
class _Copy:
    """One index, and who is a member of it."""

    index: PrefixIndex
    known: dict[str, _Known] = field(default_factory=dict)

    def join(self, holder: Holder, *, is_reported: bool) -> None:
        """A new epoch starts empty; so does a worker that others report on from here on."""
        known = self.known.get(holder.id)
        if known is not None:
            if holder.epoch < known.holder.epoch:
                return
            if holder.epoch == known.holder.epoch and (known.is_reported or not is_reported):
                return
            self.index.leave(holder.id)
            is_reported = is_reported or known.is_reported
        self.index.join(holder.id, pool_medium=holder.medium)
        self.known[holder.id] = _Known(holder, is_reported)

    def leave(self, holder_id: str) -> None:
        if self.known.pop(holder_id, None) is not None:
            self.index.leave(holder_id)

    def apply(self, change: BlockChange) -> bool:
        """False where the holder is unknown or has begun another epoch."""
        known = self.known.get(change.holder_id)
        if known is None or known.holder.epoch != change.epoch:
            return False
        if change.action is Action.STORED:
            self.index.store(change.holder_id, change.medium, change.keys, change.positions)
        elif change.action is Action.REMOVED:
            self.index.remove(change.holder_id, change.medium, change.keys)
        else:
            self.index.clear(change.holder_id)
        return True


class Replica:
    """Written by the membership and the legs of requests, read by the scheduler; all on the event loop."""

    def __init__(self, make_index: Callable[[], PrefixIndex], expected_ttl_s: float, metrics: PrefixMetrics) -> None:
        self._make_index = make_index
        self._metrics = metrics
        self._current = _Copy(make_index())
        self._filling: _Copy | None = None
        self._adopted: dict[str, Holder] = {}
        self._marks = Marks(lambda: self.index, self.computed, expected_ttl_s, metrics)
        self._heard_at: float | None = None
        self._is_followed = False
        self._evicted_told = 0
        self.position: Position | None = None
        self.snapshots = 0
        self.resumes = 0
        self.pool_costs: Mapping[str, LoadCost] = {}
        self.is_degraded = False

    @property
    def index(self) -> PrefixIndex:
        """The one that answers; another one after the next snapshot."""
        return self._current.index

    @property
    def is_current(self) -> bool:
        """All that the kvstore told is applied, and more will come."""
        return self._is_followed and self._filling is None

    @property
    def age_s(self) -> float | None:
        """Seconds since the copy was last known to be the kvstore's; None if it never was."""
        if self._heard_at is None:
            return None
        return 0.0 if self._is_followed else asyncio.get_running_loop().time() - self._heard_at

    def holders(self) -> Sequence[tuple[Holder, bool]]:
        """Workers and pools that blocks may be known of, and whether the kvstore reports them."""
        return [(known.holder, known.is_reported) for known in self._current.known.values()]

    def lookup(self, keys: bytes, block_size: int) -> Prefixes:
        """Longest prefixes of a prompt on its way to be dispatched."""
        began = time.perf_counter()
        prefixes = self.index.lookup(keys)
        self._metrics.lookup.observe(time.perf_counter() - began)
        self._metrics.depth.observe(prefixes.longest() * block_size)
        return prefixes

    # What this proxy does itself

    def mark(self, worker_id: str, keys: bytes) -> AbstractContextManager[Mark]:
        """Expect a prompt's blocks on the worker it goes to."""
        return self._marks.mark(worker_id, keys)

    def computed(self, worker_id: str, keys: bytes) -> None:
        """The worker has the blocks. Where nobody tells of them this is all to be known.

        While the kvstore is away it is so too: should the watch go on from its position, what the worker stored and
        removed since is told again, and stands.
        """
        known = self._current.known.get(worker_id)
        if known is not None and not (known.is_reported and self._is_followed):
            self.index.store(worker_id, _HBM, keys, [0])

    def adopt(self, holder: Holder) -> None:
        """This proxy uses the worker, whether or not the kvstore knows it."""
        self._adopted[holder.id] = holder
        self._current.join(holder, is_reported=False)

    def drop(self, worker_id: str) -> None:
        """This proxy uses the worker no more."""
        self._adopted.pop(worker_id, None)
        known = self._current.known.get(worker_id)
        if known is not None and not known.is_reported:
            self._current.leave(worker_id)

    # What the kvstore tells. A copy being filled is touched by nobody else, so that threads can work on it.

    def join(self, holder: Holder) -> None:
        """A worker or pool is there, whose blocks will be told."""
        for copy in self._copies():
            copy.join(holder, is_reported=True)
        self._refresh_pools()

    def leave(self, holder_id: str) -> None:
        for copy in self._copies():
            copy.leave(holder_id)
        self._refresh_pools()

    def begin_snapshot(self) -> None:
        """What follows replaces all that was told before, once it is complete."""
        self._filling = _Copy(self._make_index())

    async def apply(self, changes: Iterable[BlockChange]) -> None:
        """Take in block changes without holding up the event loop for long."""
        if self._filling is not None:
            # Tables grow while they are filled; in a thread nobody waits for that.
            await asyncio.to_thread(self._fill, self._filling, changes)
            return
        left = _SLICE_BLOCKS
        for part in _sliced(changes):
            if self._current.apply(part):
                self._metrics.deltas.labels(part.action).inc()
            else:
                self._metrics.ignored.inc()
            left -= max(1, len(part.keys) // KEY_BYTES)
            if left <= 0:
                left = _SLICE_BLOCKS
                await asyncio.sleep(0)

    async def complete_snapshot(self) -> None:
        """Answer from what was told since `begin_snapshot`, with what only this proxy knows carried over."""
        filling = self._filling
        if filling is None:
            return
        for known in list(self._current.known.values()):
            if not known.is_reported and known.holder.id not in filling.known:
                await self._carry_over(known.holder, filling)
        for known in list(filling.known.values()):
            if not known.is_reported and known.holder.id not in self._adopted:
                filling.leave(known.holder.id)
        for holder in self._adopted.values():
            filling.join(holder, is_reported=False)
        self.observe()
        self._current, self._filling, self._evicted_told = filling, None, 0
        self._heard_at = asyncio.get_running_loop().time()
        self.position = None
        self._marks.set_again()
        self._refresh_pools()
        self.snapshots += 1
        self._metrics.snapshots.inc()

    def resumed(self) -> None:
        """The kvstore goes on from `position`."""
        self.resumes += 1
        self._metrics.resumes.inc()

    def followed(self, position: Position | None, *, is_degraded: bool) -> None:
        """All that was told up to `position` has been applied.

        A degraded kvstore has no positions. What it tells cannot be continued elsewhere, so the last one is void then.
        """
        self.is_degraded = is_degraded
        if self._filling is not None or self._heard_at is None:
            return
        if position is not None or is_degraded:
            self.position = position
        self._is_followed = True

    def lost(self) -> None:
        """The kvstore is away, and a half-told snapshot worth nothing."""
        if self._is_followed:
            self._heard_at = asyncio.get_running_loop().time()
        self._is_followed = False
        self._filling = None

    def observe(self) -> Usage:
        """Set the gauges to what is returned."""
        usage, metrics = self.index.usage(), self._metrics
        metrics.blocks.set(usage.blocks)
        metrics.entries.set(usage.entries)
        metrics.bytes.set(usage.bytes)
        metrics.degraded.set(self.is_degraded)
        metrics.evicted.inc(usage.evicted_blocks - self._evicted_told)
        self._evicted_told = usage.evicted_blocks
        if (age_s := self.age_s) is not None:
            metrics.age.set(age_s)
        return usage

    def _copies(self) -> tuple[_Copy, ...]:
        return (self._current,) if self._filling is None else (self._current, self._filling)

    def _fill(self, filling: _Copy, changes: Iterable[BlockChange]) -> None:
        ignored = sum(not filling.apply(part) for part in _sliced(changes))
        self._metrics.ignored.inc(ignored)

    async def _carry_over(self, holder: Holder, filling: _Copy) -> None:
        filling.join(holder, is_reported=False)
        changes = [
            BlockChange(holder.id, holder.epoch, Action.STORED, medium, keys, positions.tolist())
            for medium, keys, positions in self.index.held(holder.id)
        ]
        await asyncio.to_thread(self._fill, filling, changes)

    def _refresh_pools(self) -> None:
        holders = (known.holder for known in self._current.known.values())
        self.pool_costs = {holder.id: holder.cost for holder in holders if holder.cost is not None}


def _sliced(changes: Iterable[BlockChange]) -> Iterator[BlockChange]:
    size = _SLICE_BLOCKS * KEY_BYTES
    for change in changes:
        if len(change.keys) <= size:
            yield change
            continue
        for start in range(0, len(change.keys), size):
            keys, block = change.keys[start : start + size], start // KEY_BYTES
            at = change.positions
            at = [at[0] + block] if len(at) == 1 else at[block : block + _SLICE_BLOCKS]
            yield replace(change, keys=keys, positions=at)
