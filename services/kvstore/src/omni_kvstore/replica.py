"""One replica's view of the cluster, kept equal to Redis by its event stream, and kept alone while Redis is away.

start ──> catch up ──> follow events ──┐       catch up: re-assert what lives here, load all, owe snapshots
             ^                         │ error
             └── degraded, back off <──┘       degraded: members from memory, own leases on the local clock
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence

from omni_common.errors import FailedPrecondition, ResourceExhausted, Unavailable
from omni_kvstore.feed import Feed, Update, Watcher
from omni_kvstore.membership import BlockChange, Directory, Leases, Renewal, Worker, WorkerChange, WorkerLeft
from omni_kvstore.metrics import Metrics
from omni_kvstore.store import Event, RedisStore, State

log = logging.getLogger(__name__)

_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.05, 1.0
_SWEEP_BUDGET = 2048


class Replica:
    """Owner of the directory, the local leases and the feed."""

    def __init__(
        self,
        store: RedisStore,
        feed: Feed,
        leases: Leases,
        metrics: Metrics,
        *,
        max_workers: int,
        reconcile_s: float,
        wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._feed, self._leases, self._metrics = store, feed, leases, metrics
        self._reconcile_s, self._wait_ms, self._clock = reconcile_s, max(1, int(wait_s * 1000)), clock
        self._max_workers = max_workers
        self._directory = Directory()
        self._left: dict[str, int] = {}
        self._dataset, self._position = "", 0
        self.is_degraded = True
        self.answered_once = asyncio.Event()
        metrics.degraded.set(1)

    async def renew(self, worker: Worker) -> Renewal:
        """Take or renew a lease, in memory alone while Redis is away.

        Raises:
            FailedPrecondition: a later epoch of the worker is in force.
            ResourceExhausted: there are `max_workers` others.
        """
        if len(self._directory) >= self._max_workers and self._directory.get(worker.worker_id) is None:
            raise ResourceExhausted(f"{self._max_workers} workers are registered", reason="max_workers")
        renewal = await self._renew(worker)
        if not renewal.accepted:
            message = f"epoch {worker.epoch} of worker {worker.worker_id!r} ended; {renewal.epoch} is in force"
            raise FailedPrecondition(message, reason="stale_epoch")
        self._leases.renew(worker.worker_id, self._clock())
        self._left.pop(worker.worker_id, None)
        return renewal

    async def _renew(self, worker: Worker) -> Renewal:
        if not self.is_degraded:
            try:
                return await self._store.register(worker)
            except Unavailable as error:
                log.warning("lease kept in memory only", extra={"worker": worker.worker_id, "reason": error.reason})
        known = self._directory.get(worker.worker_id)
        if known and known.epoch > worker.epoch:
            return Renewal(accepted=False, epoch=known.epoch, wants_snapshot=False)
        self._tell(self._directory.put(worker))
        return Renewal(accepted=True, epoch=worker.epoch, wants_snapshot=False)

    async def leave(self, worker_id: str, epoch: int) -> None:
        """End a membership at once; made up for in Redis later if that is away."""
        self._leases.end(worker_id)
        if not self.is_degraded:
            try:
                await self._store.leave(worker_id, epoch)
                return
            except Unavailable:
                log.warning("worker left in memory only", extra={"worker": worker_id})
        if changes := self._directory.drop(worker_id, epoch):
            self._left[worker_id] = epoch
            self._tell(changes)

    async def updates(self, wants_blocks: bool) -> AsyncIterator[Update]:
        """A snapshot, then changes, until the feed closes; another snapshot wherever changes were lost."""
        with self._feed.watch(wants_blocks) as watcher:
            self._metrics.watchers.set(len(self._feed))
            try:
                while not watcher.is_closed:
                    if watcher.settle_snapshot():
                        async for update in self._snapshot(watcher):
                            yield update
                    elif update_or_none := await watcher.next():
                        yield update_or_none
            finally:
                self._metrics.watchers.set(len(self._feed) - 1)

    async def _snapshot(self, watcher: Watcher) -> AsyncIterator[Update]:
        """Members as of now, then their blocks in pages. Changes since are queued and follow; replaying one
        that a page already shows changes nothing."""
        self._metrics.snapshots.inc()
        workers = self._directory.all()
        yield Update(tuple(WorkerChange(w) for w in workers), snapshot=True, degraded=self.is_degraded)
        if not watcher.wants_blocks or self.is_degraded:
            return
        try:
            for worker in workers:
                async for page in self._store.blocks_of(worker.worker_id):
                    yield Update(blocks=(page,))
        except Unavailable:
            watcher.owe_snapshot()
            self._degrade()

    async def follow(self) -> None:
        """Keep equal to Redis for ever."""
        backoff_s = _FIRST_BACKOFF_S
        while True:
            try:
                await self._catch_up()
                backoff_s = _FIRST_BACKOFF_S
                await self._follow_events()
            except Unavailable as error:
                if not self.is_degraded or backoff_s == _FIRST_BACKOFF_S:
                    log.warning("Redis is away; serving from memory", extra={"reason": error.message})
                self._degrade()
                await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
                backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)

    async def _catch_up(self) -> None:
        state = await self._store.load()
        lost_data = bool(self._dataset) and state.dataset != self._dataset
        own = self._leases.live(self._clock())
        for worker in self._directory.all():
            if lost_data or worker.worker_id in own:
                await self._store.register(worker)
        for worker_id, epoch in list(self._left.items()):
            await self._store.leave(worker_id, epoch)
            if self._left.get(worker_id) == epoch:
                del self._left[worker_id]
        self._take_over(await self._store.load())
        log.info("following Redis", extra={"workers": len(self._directory), "lost_data": lost_data})

    def _take_over(self, state: State) -> None:
        self._dataset, self._position = state.dataset, state.position
        self._directory.replace(state.workers)
        self._metrics.entries.set(state.entries)
        self.is_degraded = False
        self._metrics.degraded.set(0)
        self._feed.owe_snapshots()
        self.answered_once.set()

    async def _follow_events(self) -> None:
        """Returns when events were lost; then only a full load helps."""
        reconcile_at = self._clock() + self._reconcile_s
        while not self.is_degraded:
            numbered = await self._store.events_after(self._position, self._wait_ms)
            if any(number != self._position + i for i, (number, _) in enumerate(numbered, start=1)):
                return
            self._position += len(numbered)
            self._apply([event for _, event in numbered])
            if self._clock() >= reconcile_at:
                if not await self._reconcile():
                    return
                reconcile_at = self._clock() + self._reconcile_s

    def _apply(self, events: Sequence[Event]) -> None:
        workers: list[WorkerChange] = []
        blocks: list[BlockChange] = []
        for event in events:
            if isinstance(event, BlockChange):
                blocks.append(event)
                continue
            # A message lists workers before blocks, so blocks told so far go out first.
            if blocks:
                self._tell(workers, blocks)
                workers, blocks = [], []
            if isinstance(event, WorkerLeft):
                workers += self._directory.drop(event.worker_id, event.epoch)
            else:
                workers += self._directory.put(event)
        self._tell(workers, blocks)

    async def _reconcile(self) -> bool:
        """Compare with Redis; False if it is another data set or behind what was read."""
        state = await self._store.load()
        self._metrics.entries.set(state.entries)
        if state.dataset != self._dataset or state.position < self._position:
            return False
        if state.position == self._position:
            self._tell(self._directory.replace(state.workers))
        return True

    async def keep(self, period_s: float) -> None:
        """End leases that are over and remove what they held, for ever."""
        while True:
            try:
                if not self.is_degraded:
                    await self._reap(until_s=self._clock() + period_s)
            except Unavailable as error:
                log.warning("leases not looked at", extra={"reason": error.message})
            self._expire_locally()
            await asyncio.sleep(period_s)

    async def _reap(self, until_s: float) -> None:
        reaped = await self._store.reap()
        self._metrics.leases.set(reaped.leases)
        self._metrics.leases_ended.inc(reaped.ended)
        left = reaped.trash
        while left and self._clock() < until_s:
            left = await self._store.sweep(_SWEEP_BUDGET)
        self._metrics.unswept_runs.set(left)

    def _expire_locally(self) -> None:
        """Redis decides while it is there; the local clock only tells who went silent in its absence."""
        for worker_id in self._leases.expire(self._clock()):
            worker = self._directory.get(worker_id)
            if self.is_degraded and worker:
                self._tell(self._directory.drop(worker_id, worker.epoch))

    def _degrade(self) -> None:
        if not self.is_degraded:
            self.is_degraded = True
            self._metrics.degraded.set(1)
            self._feed.publish(Update(degraded=True))

    def _tell(self, workers: Sequence[WorkerChange], blocks: Sequence[BlockChange] = ()) -> None:
        if workers or blocks:
            self._feed.publish(Update(tuple(workers), tuple(blocks), degraded=self.is_degraded))
