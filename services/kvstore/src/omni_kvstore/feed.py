"""Changes on their way to watchers: one bounded queue each, and a snapshot owed where a queue ran over."""

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from omni_kvstore.blocks import Action, BlockChange, BlockEvent
from omni_kvstore.membership import WorkerChange

MAX_UPDATE_BLOCKS = 65_536


@dataclass(frozen=True, slots=True)
class Position:
    """A point of the stream of changes."""

    dataset: str
    event: int


@dataclass(frozen=True, slots=True)
class Update:
    """One message to a watcher. A snapshot replaces everything told before and is whole with `complete`.

    `position` is set where everything up to it has been told with this message.
    """

    workers: Sequence[WorkerChange] = ()
    blocks: Sequence[BlockChange] = ()
    snapshot: bool = False
    complete: bool = False
    degraded: bool = False
    position: Position | None = None


@dataclass(frozen=True, slots=True)
class Interest:
    """What a watch asked for; an empty `model` means all."""

    blocks: bool
    model: str = ""

    def of(self, update: Update) -> Update:
        """The part of an update that is wanted; its position stays."""
        if self.blocks and not self.model:
            return update
        return replace(
            update,
            workers=[c for c in update.workers if self.model in ("", c.worker.model)],
            blocks=[c for c in update.blocks if self.blocks and self.model in ("", c.model)],
        )


class Watcher:
    """One watch: begins owing a snapshot, then queues updates in order."""

    def __init__(self, interest: Interest, bound: int) -> None:
        self.interest = interest
        self.is_closed = False
        self._bound = bound
        self._queue: deque[Update] = deque()
        self._owes_snapshot = True
        self._wake = asyncio.Event()

    def offer(self, update: Update) -> None:
        """Queue what this watch asked for; a full queue is replaced by the debt of a snapshot."""
        wanted = self.interest.of(update)
        is_of_others = bool(update.workers or update.blocks) and not (wanted.workers or wanted.blocks)
        if self._owes_snapshot or is_of_others:
            return
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
    def watch(self, interest: Interest) -> Iterator[Watcher]:
        watcher = Watcher(interest, self._queue_bound)
        if self._is_closed:
            watcher.close()
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def publish(self, update: Update) -> None:
        for watcher in self._watchers:
            watcher.offer(update)

    def owe_snapshots(self) -> None:
        for watcher in self._watchers:
            watcher.owe_snapshot()

    def close(self) -> None:
        self._is_closed = True
        for watcher in self._watchers:
            watcher.close()


Change = WorkerChange | BlockChange


class Gathering:
    """Changes in order, gathered into as few updates as a message's order and size allow."""

    def __init__(self) -> None:
        self._workers: list[WorkerChange] = []
        self._blocks: list[BlockChange] = []
        self._num_blocks = 0

    def add(self, changes: Iterable[Change]) -> Iterator[Update]:
        """Updates that had to be closed; the last changes stay here until `rest`."""
        for change in changes:
            if isinstance(change, WorkerChange):
                # A message lists workers before blocks, so blocks told so far go out first.
                if self._blocks:
                    yield self.rest()
                self._workers.append(change)
                continue
            if self._num_blocks >= MAX_UPDATE_BLOCKS:
                yield self.rest()
            self._num_blocks += len(change.event)
            self._append(change)

    def _append(self, change: BlockChange) -> None:
        """Removals that follow each other become one."""
        last = self._blocks[-1] if self._blocks else None
        event = change.event
        if (
            last is not None
            and event.action is last.event.action is Action.REMOVED
            and (change.worker_id, change.epoch, event.medium) == (last.worker_id, last.epoch, last.event.medium)
        ):
            joined = BlockEvent(Action.REMOVED, event.medium, last.event.keys + event.keys)
            self._blocks[-1] = replace(last, event=joined)
        else:
            self._blocks.append(change)

    def rest(self, position: Position | None = None, *, degraded: bool = False) -> Update:
        """What has been added since the last update."""
        update = Update(tuple(self._workers), tuple(self._blocks), degraded=degraded, position=position)
        self._workers, self._blocks, self._num_blocks = [], [], 0
        return update
