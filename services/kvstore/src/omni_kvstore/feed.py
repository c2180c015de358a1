"""Changes on their way to watchers: one bounded queue each, and a snapshot owed where a queue ran over."""

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from omni_kvstore.membership import BlockChange, WorkerChange


@dataclass(frozen=True, slots=True)
class Update:
    """One message to a watcher; a snapshot replaces everything told before."""

    workers: Sequence[WorkerChange] = ()
    blocks: Sequence[BlockChange] = ()
    snapshot: bool = False
    degraded: bool = False


class Watcher:
    """One watch: begins owing a snapshot, then queues updates in order."""

    def __init__(self, wants_blocks: bool, bound: int) -> None:
        self.wants_blocks = wants_blocks
        self.is_closed = False
        self._bound = bound
        self._queue: deque[Update] = deque()
        self._owes_snapshot = True
        self._wake = asyncio.Event()

    def offer(self, update: Update) -> None:
        """Queue what this watch asked for; a full queue is replaced by the debt of a snapshot."""
        wanted = update if self.wants_blocks else replace(update, blocks=())
        if len(self._queue) >= self._bound:
            self.owe_snapshot()
        else:
            self._queue.append(wanted)
            self._wake.set()

    def owe_snapshot(self) -> None:
        self._queue.clear()
        self._owes_snapshot = True
        self._wake.set()

    def settle_snapshot(self) -> bool:
        """True once per debt; updates queued from here on follow the snapshot taken now."""
        owed, self._owes_snapshot = self._owes_snapshot, False
        if owed:
            self._queue.clear()
        return owed

    async def next(self) -> Update | None:
        """The next update; None where a snapshot is owed instead, or the watch is closed."""
        while not (self._queue or self._owes_snapshot or self.is_closed):
            self._wake.clear()
            await self._wake.wait()
        return None if self._owes_snapshot or self.is_closed else self._queue.popleft()

    def close(self) -> None:
        self.is_closed = True
        self._wake.set()


class Feed:
    """All watches of one replica."""

    def __init__(self, queue_bound: int) -> None:
        self._queue_bound = queue_bound
        self._watchers: set[Watcher] = set()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._watchers)

    @contextmanager
    def watch(self, wants_blocks: bool) -> Iterator[Watcher]:
        watcher = Watcher(wants_blocks, self._queue_bound)
        if self._is_closed:
            watcher.close()
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def publish(self, update: Update) -> None:
        for watcher in self._watchers:
            if update.workers or update.degraded or not update.blocks or watcher.wants_blocks:
                watcher.offer(update)

    def owe_snapshots(self) -> None:
        for watcher in self._watchers:
            watcher.owe_snapshot()

    def close(self) -> None:
        self._is_closed = True
        for watcher in self._watchers:
            watcher.close()
