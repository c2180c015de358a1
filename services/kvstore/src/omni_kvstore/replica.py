"""One replica's view of the cluster, kept equal to Redis by its event stream, and kept alone while Redis is away.

start ──> catch up ──> follow events ──┐       catch up: re-assert what lives here, load all, owe snapshots
             ^                         │ error
             └── degraded, back off <──┘       degraded: members and blocks from memory, own leases on the local clock
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from omni_common.errors import FailedPrecondition, ResourceExhausted, Unavailable
from omni_kvstore.blocks import Batch, BlockChange, Match
from omni_kvstore.events import Event
from omni_kvstore.feed import Feed, Gathering, Position, Update
from omni_kvstore.membership import Leases, Renewal, Worker, WorkerChange
from omni_kvstore.memory import BlockMemory
from omni_kvstore.metrics import Metrics
from omni_kvstore.store import Published, RedisStore, Standing, State
from omni_kvstore.view import View

log = logging.getLogger(__name__)

_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.05, 1.0
_SWEEP_BUDGET = 2048


class Replica:
    """Owner of the view and the local leases; tells the feed of every change."""

    def __init__(
        self,
        store: RedisStore,
        feed: Feed,
        leases: Leases,
        metrics: Metrics,
        *,
        max_workers: int,
        memory_blocks: int,
        reconcile_s: float,
        wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._feed, self._leases, self._metrics = store, feed, leases, metrics
        self._reconcile_s, self._wait_ms, self._clock = reconcile_s, max(1, int(wait_s * 1000)), clock
        self._max_workers, self._memory_blocks = max_workers, memory_blocks
        self.view = View(BlockMemory(memory_blocks))
        self._left: dict[str, int] = {}
        self._unstored: dict[str, int] = {}
        self.answered_once = asyncio.Event()
        metrics.degraded.set(1)

    async def renew(self, worker: Worker) -> Renewal:
        """Take or renew a lease, in memory alone while Redis is away.

        Raises:
            FailedPrecondition: a later epoch of the worker is in force.
            ResourceExhausted: there are `max_workers` others.
        """
        known = self.view.directory.get(worker.worker_id)
        if known is None and len(self.view.directory) >= self._max_workers:
            raise ResourceExhausted(f"{self._max_workers} workers are registered", reason="max_workers")
        if known and known.epoch == worker.epoch:
            # Who beats is not silent, however long Redis takes to say so.
            self._leases.renew(worker.worker_id, self._clock())
        renewal = await self._renew(worker)
        if not renewal.accepted:
            message = f"epoch {worker.epoch} of worker {worker.worker_id!r} ended; {renewal.epoch} is in force"
            raise FailedPrecondition(message, reason="stale_epoch")
        self._leases.renew(worker.worker_id, self._clock())
        self._left.pop(worker.worker_id, None)
        return renewal

    async def _renew(self, worker: Worker) -> Renewal:
        if not self.view.is_degraded:
            try:
                return await self._store.register(worker)
            except Unavailable as error:
                log.warning("lease kept in memory only", extra={"worker": worker.worker_id, "reason": error.reason})
        known = self.view.directory.get(worker.worker_id)
        if known and known.epoch > worker.epoch:
            return Renewal(accepted=False, epoch=known.epoch, wants_snapshot=False)
        self._tell(self.view.directory.put(worker))
        return Renewal(accepted=True, epoch=worker.epoch, wants_snapshot=False)

    async def leave(self, worker_id: str, epoch: int) -> None:
        """End a membership at once; made up for in Redis later if that is away."""
        self._leases.end(worker_id)
        if not self.view.is_degraded:
            try:
                await self._store.leave(worker_id, epoch)
                return
            except Unavailable:
                log.warning("worker left in memory only", extra={"worker": worker_id})
        if changes := self.view.directory.drop(worker_id, epoch):
            self._left[worker_id] = epoch
            self._tell(changes)

    async def publish(self, batch: Batch) -> Published:
        """Apply a batch, in memory alone while Redis is away; the worker is asked for a snapshot afterwards.

        Raises:
            FailedPrecondition: another epoch is in force (`stale_epoch`), or none (`not_registered`).
        """
        if not self.view.is_degraded:
            try:
                published = await self._store.publish(batch)
            except Unavailable as error:
                log.warning("blocks kept in memory only", extra={"worker": batch.worker_id, "reason": error.reason})
            else:
                self.view.memory.note(batch.worker_id, published.sequence)
                return published
        return self._publish_to_memory(batch)

    def _publish_to_memory(self, batch: Batch) -> Published:
        known = self.view.directory.get(batch.worker_id)
        if known is None or known.epoch != batch.epoch:
            is_stale = known is not None and known.epoch > batch.epoch
            message = f"worker {batch.worker_id!r} holds no lease for epoch {batch.epoch}"
            raise FailedPrecondition(message, reason="stale_epoch" if is_stale else "not_registered")
        self._unstored[batch.worker_id] = batch.epoch
        if self.view.memory.has_seen(batch):
            return Published(self.view.memory.last_sequence(batch.worker_id), gap=False)
        if not self.view.memory.follows(batch):
            return Published(self.view.memory.last_sequence(batch.worker_id), gap=True)
        changes = [BlockChange(batch.worker_id, batch.epoch, event, known.model) for event in batch.as_changes()]
        self.view.memory.note(batch.worker_id, batch.sequence)
        self._tell((), changes)
        return Published(batch.sequence, gap=False)

    def knows(self, worker_id: str) -> bool:
        return self.view.directory.get(worker_id) is not None

    async def lookup(self, model: str, block_size: int, keys: bytes) -> tuple[list[Match], bool]:
        """Matches, and whether they come from memory because Redis is away."""
        if not self.view.is_degraded:
            try:
                return await self._store.lookup(model, block_size, keys), False
            except Unavailable as error:
                log.warning("lookup from memory", extra={"reason": error.reason})
        return self.view.memory.lookup(keys), True

    async def standings(self) -> tuple[Sequence[Standing], bool]:
        """All members, and whether they come from memory because Redis is away."""
        if not self.view.is_degraded:
            try:
                return (await self._store.load()).standings, False
            except Unavailable:
                pass
        left, memory = self._leases.left_s(self._clock()), self.view.memory
        return [
            Standing(
                worker,
                memory.last_sequence(worker.worker_id),
                worker.worker_id in self._unstored,
                memory.count(worker.worker_id),
                left.get(worker.worker_id, 0.0),
            )
            for worker in self.view.directory.all()
        ], True

    async def blocks_of(self, worker_id: str) -> AsyncIterator[tuple[BlockChange, bool]]:
        """A worker's blocks in pages, from memory while Redis is away."""
        worker = self.view.directory.get(worker_id)
        if self.view.is_degraded:
            for change in self.view.memory.held(worker) if worker else ():
                yield change, True
            return
        async for change in self._store.blocks_of(worker_id):
            yield change, False

    async def follow(self) -> None:
        """Keep equal to Redis for ever.

        Raises:
            FailedPrecondition: Redis holds another schema.
        """
        backoff_s = _FIRST_BACKOFF_S
        while True:
            try:
                await self._catch_up()
                backoff_s = _FIRST_BACKOFF_S
                await self._follow_events()
            except Unavailable as error:
                if not self.view.is_degraded or backoff_s == _FIRST_BACKOFF_S:
                    log.warning("Redis is away; serving from memory", extra={"reason": error.message})
                self._degrade()
                await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
                backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)

    async def _catch_up(self) -> None:
        state = await self._store.load()
        lost_data = bool(self.view.at.dataset) and state.dataset != self.view.at.dataset
        own = self._leases.live(self._clock())
        for worker in self.view.directory.all():
            if lost_data or worker.worker_id in own:
                await self._store.register(worker)
        await self._settle_debts()
        state = await self._store.load()
        memory = await self._read_blocks(state)
        self._take_over(state, memory)
        log.info("following Redis", extra={"workers": len(self.view.directory), "lost_data": lost_data})

    async def _settle_debts(self) -> None:
        """Tell Redis who left, and whose blocks it missed, while it was away."""
        for worker_id, epoch in list(self._left.items()):
            await self._store.leave(worker_id, epoch)
            if self._left.get(worker_id) == epoch:
                del self._left[worker_id]
        for worker_id, epoch in list(self._unstored.items()):
            await self._store.want_snapshot(worker_id, epoch)
            if self._unstored.get(worker_id) == epoch:
                del self._unstored[worker_id]

    async def _read_blocks(self, state: State) -> BlockMemory:
        """All blocks, as of the state or later; the events after it make them whole."""
        memory = BlockMemory(self._memory_blocks)
        memory.members_changed(WorkerChange(worker) for worker in state.workers)
        for standing in state.standings:
            async for change in self._store.blocks_of(standing.worker.worker_id):
                if change.epoch == standing.worker.epoch:
                    memory.blocks_changed([change])
            memory.note(standing.worker.worker_id, standing.sequence)
        return memory

    def _take_over(self, state: State, memory: BlockMemory) -> None:
        self.view.replace(state.workers, memory, Position(state.dataset, state.position))
        self._metrics.entries.set(state.entries)
        self._metrics.degraded.set(0)
        self._feed.owe_snapshots()
        self.answered_once.set()

    async def _follow_events(self) -> None:
        """Returns when events were lost; then only a full load helps."""
        reconcile_at = self._clock() + self._reconcile_s
        while not self.view.is_degraded:
            numbered = await self._store.events_after(self.view.at.event, self._wait_ms)
            if any(number != self.view.at.event + i for i, (number, _) in enumerate(numbered, start=1)):
                return
            if numbered:
                self._apply([event for _, event in numbered], replace(self.view.at, event=numbered[-1][0]))
            if self._clock() >= reconcile_at:
                if not await self._reconcile():
                    return
                reconcile_at = self._clock() + self._reconcile_s

    def _apply(self, events: Sequence[Event], position: Position) -> None:
        gathering, updates = Gathering(), list[Update]()
        for event in events:
            updates += gathering.add(self.view.apply(event))
        self.view.at = position
        for update in (*updates, gathering.rest(position)):
            self._feed.publish(update)

    async def _reconcile(self) -> bool:
        """Compare with Redis; False if it is another data set or behind what was read."""
        state = await self._store.load()
        self._metrics.entries.set(state.entries)
        self._metrics.redis_bytes.set(await self._store.used_bytes())
        # Reads all holder sets, milliseconds in a large index.
        self._metrics.show_memory(self.view.memory.usage())
        if state.dataset != self.view.at.dataset or state.position < self.view.at.event:
            return False
        if state.position == self.view.at.event:
            self._tell(self.view.directory.replace(state.workers))
        return True

    async def keep(self, period_s: float) -> None:
        """End leases that are over and remove what they held, for ever."""
        while True:
            try:
                if not self.view.is_degraded:
                    await self._settle_debts()
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
            worker = self.view.directory.get(worker_id)
            if self.view.is_degraded and worker:
                self._tell(self.view.directory.drop(worker_id, worker.epoch))

    def _degrade(self) -> None:
        if not self.view.is_degraded:
            self.view.is_degraded = True
            self._metrics.degraded.set(1)
            self._feed.publish(Update(degraded=True))

    def _tell(self, workers: Sequence[WorkerChange], blocks: Sequence[BlockChange] = ()) -> None:
        """Remember and publish changes that are not of the event stream."""
        if workers or blocks:
            self.view.memory.members_changed(workers)
            self.view.memory.blocks_changed(blocks)
            self._feed.publish(Update(tuple(workers), tuple(blocks), degraded=self.view.is_degraded))
