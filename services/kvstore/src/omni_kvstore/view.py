"""What one replica knows of the cluster, and as of which change. No Redis, no wire."""

from collections.abc import Sequence

from omni_kvstore.blocks import BlockChange
from omni_kvstore.events import BlocksChanged, Event
from omni_kvstore.feed import Change, Position
from omni_kvstore.membership import Directory, Worker, WorkerChange, WorkerLeft
from omni_kvstore.memory import BlockMemory


class View:
    """Members, their blocks, the position reached, and whether all that is kept without Redis."""

    def __init__(self, memory: BlockMemory) -> None:
        self.directory = Directory()
        self.memory = memory
        self.at = Position("", 0)
        self.is_degraded = True

    def replace(self, workers: Sequence[Worker], memory: BlockMemory, at: Position) -> None:
        """Redis's state in place of all that was known."""
        self.directory.replace(workers)
        self.memory, self.at, self.is_degraded = memory, at, False

    def apply(self, event: Event) -> list[Change]:
        """Take in an event of the stream; returns what watchers are to be told of it."""
        match event:
            case BlocksChanged():
                changes = self.block_changes(event)
                self.memory.blocks_changed(changes)
                return list(changes)
            case WorkerLeft():
                members = self.directory.drop(event.worker_id, event.epoch)
            case Worker():
                members = self.directory.put(event)
        self.memory.members_changed(members)
        return list(members)

    def as_told(self, event: Event) -> list[Change]:
        """What watchers were told of an earlier event, or would have been."""
        match event:
            case Worker():
                return [WorkerChange(event)]
            case WorkerLeft():
                return [WorkerChange(Worker(event.worker_id, event.epoch, event.model, 0, b""), removed=True)]
            case BlocksChanged():
                return list(self.block_changes(event))

    def block_changes(self, changed: BlocksChanged) -> list[BlockChange]:
        """None where the epoch is not a member any more: its blocks went with it."""
        worker = self.directory.get(changed.worker_id)
        if worker is None or worker.epoch != changed.epoch:
            return []
        return [BlockChange(worker.worker_id, worker.epoch, event, worker.model) for event in changed.events]
