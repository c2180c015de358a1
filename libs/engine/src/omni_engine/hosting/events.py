"""Relay of the engine's block events to the kvstore: engine.events() -> mirror (hash -> key) -> publisher."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from omni_engine.hosting.mirror import BlockMirror
from omni_engine.hosting.publisher import BlockPublisher
from omni_engine.ports import BlockEvent, BlocksCleared, BlocksRemoved, BlocksStored, Engine, EventBatch

log = logging.getLogger(__name__)

_RESTART_S = 1.0
_KINDS: Mapping[type[BlockEvent], str] = {BlocksStored: "stored", BlocksRemoved: "removed", BlocksCleared: "cleared"}


@dataclass(frozen=True, slots=True)
class RelayReport:
    """Totals since the start, and what is held now.

    `events` are the engine's, by kind; `skipped` counts blocks, by reason; a gap is a break in the engine's stream,
    which replayed batches may have filled; a reset dropped all that was mirrored.
    """

    events: Mapping[str, int]
    skipped: Mapping[str, int]
    gaps: int
    replayed: int
    resets: int
    snapshots: int
    pending: int
    mirrored: int


class BlockRelay:
    """Mirrors and publishes what the engine caches; never slows the engine and never fails.

    Where events are lost for good the mirror drops everything: it may miss blocks from then on, but names none that
    the engine may have evicted.
    """

    def __init__(self, engine: Engine, mirror: BlockMirror, publisher: BlockPublisher) -> None:
        self._engine = engine
        self._mirror = mirror
        self._publisher = publisher
        self._last_sequence: int | None = None
        self._was_replayed = False
        self._events: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._gaps = self._replayed = self._resets = 0

    @property
    def mirror(self) -> BlockMirror:
        return self._mirror

    def report(self) -> RelayReport:
        """May be called from another thread, as scraping does; hence the copies."""
        return RelayReport(
            events=dict(self._events),
            skipped=Counter(dict(self._skipped)) + Counter(dict(self._mirror.skipped)),
            gaps=self._gaps,
            replayed=self._replayed,
            resets=self._resets,
            snapshots=self._publisher.snapshots,
            pending=self._publisher.num_pending,
            mirrored=len(self._mirror),
        )

    def request_snapshot(self) -> None:
        """The kvstore does not have all of this epoch's blocks."""
        self._publisher.request_snapshot()

    async def run(self, registered: Callable[[], Awaitable[None]]) -> None:
        """Relay until cancelled; `registered` returns once the kvstore knows the worker."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(), name="block-events")
            group.create_task(self._publisher.run(registered), name="block-publisher")

    async def _follow(self) -> None:
        while True:
            try:
                async for batch in self._engine.events():
                    self._take(batch)
                return
            except Exception:  # a defect here must not end serving
                log.exception("block events broke off; reading on")
                self._reset()
                await asyncio.sleep(_RESTART_S)

    def _take(self, batch: EventBatch) -> None:
        self._watch_sequence(batch)
        self._skipped.update(batch.skipped)
        occurred_unix_ms = batch.occurred_unix_ms or int(time.time() * 1e3)
        for event in batch.events:
            self._events[_KINDS[type(event)]] += 1
            try:
                self._apply(event, occurred_unix_ms)
            except Exception:  # what the event did to the mirror is unknown
                log.exception("block event not understood")
                self._reset()

    def _watch_sequence(self, batch: EventBatch) -> None:
        last, self._last_sequence = self._last_sequence, batch.sequence
        was_replayed, self._was_replayed = self._was_replayed, batch.is_replayed
        is_lost = last is not None and batch.sequence != last + 1
        self._replayed += batch.is_replayed
        self._gaps += (is_lost or batch.is_replayed) and not was_replayed
        if is_lost:
            log.warning(
                "block events lost; what was mirrored is dropped",
                extra={"last": last, "next": batch.sequence, "blocks": len(self._mirror)},
            )
            self._reset()

    def _apply(self, event: BlockEvent, occurred_unix_ms: int) -> None:
        if isinstance(event, BlocksCleared):
            self._mirror.clear()
            self._publisher.clear(occurred_unix_ms)
        else:
            self._publisher.add(self._mirror.apply(event), occurred_unix_ms)

    def _reset(self) -> None:
        self._resets += 1
        self._mirror.clear()
        self._publisher.clear(int(time.time() * 1e3))
