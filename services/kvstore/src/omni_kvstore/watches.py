"""What each watch is told: a snapshot, or what it missed; then changes."""

import asyncio
from collections.abc import AsyncIterator

from omni_common.errors import Unavailable
from omni_kvstore.feed import Feed, Gathering, Interest, Position, Update, Watcher
from omni_kvstore.membership import WorkerChange
from omni_kvstore.metrics import Metrics
from omni_kvstore.store import RedisStore
from omni_kvstore.view import View


class Watches:
    """Reads the view, and of the store only what a watch missed."""

    def __init__(self, view: View, feed: Feed, store: RedisStore, metrics: Metrics) -> None:
        self._view, self._feed, self._store, self._metrics = view, feed, store, metrics

    async def updates(self, interest: Interest, resume: Position | None = None) -> AsyncIterator[Update]:
        """A snapshot, or what changed since `resume`; then changes, until the feed closes.

        Another snapshot comes wherever changes were lost.
        """
        with self._feed.watch(interest) as watcher:
            self._metrics.watchers.set(len(self._feed))
            try:
                if resume is not None:
                    for update in await self._missed(watcher, resume):
                        yield interest.of(update)
                while not watcher.is_closed:
                    if watcher.settle_snapshot():
                        async for update in self._snapshot(interest):
                            yield update
                    elif update_or_none := await watcher.next():
                        yield update_or_none
            finally:
                self._metrics.watchers.set(len(self._feed) - 1)

    async def _missed(self, watcher: Watcher, resume: Position) -> list[Update]:
        """The changes after a position, if Redis still has them all; else none, and the snapshot stays owed."""
        at = self._view.at
        if self._view.is_degraded or resume.dataset != at.dataset or resume.event > at.event:
            return []
        # Changes from here on are queued; those up to here are read.
        watcher.settle_snapshot()
        try:
            updates = await self._between(resume.event, at)
        except Unavailable:
            updates = None
        if updates is None:
            watcher.owe_snapshot()
            return []
        self._metrics.resumes.inc()
        return updates

    async def _between(self, after: int, at: Position) -> list[Update] | None:
        """The changes after an event up to a position; None where some are gone."""
        gathering, updates, last = Gathering(), list[Update](), after
        async for page in self._store.events_between(after, at.event):
            for number, event in page:
                if number != last + 1:
                    return None
                last = number
                updates += gathering.add(self._view.as_told(event))
        return [*updates, gathering.rest(at)] if last == at.event else None

    async def _snapshot(self, interest: Interest) -> AsyncIterator[Update]:
        """Members as of now, then their blocks in pages. Changes since are queued and follow; replaying one
        that a page already shows changes nothing."""
        self._metrics.snapshots.inc()
        view = self._view
        degraded, workers = view.is_degraded, view.directory.all()
        at = None if degraded else view.at
        yield interest.of(Update(tuple(WorkerChange(w) for w in workers), snapshot=True, degraded=degraded))
        for worker in workers if interest.blocks else ():
            if interest.model not in ("", worker.model) or view.directory.get(worker.worker_id) != worker:
                continue
            for page in view.memory.held(worker):
                yield Update(blocks=(page,), degraded=degraded)
            await asyncio.sleep(0)
        yield Update(complete=True, degraded=degraded, position=at)
