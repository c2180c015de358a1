"""Workers, their leases, and who is a member as one replica knows it. No clock, no Redis, no wire."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Worker:
    """One epoch of a worker, or of a pool of blocks, which has a `pool_medium`.

    `info` is its description in wire form, opaque here.
    """

    worker_id: str
    epoch: int
    model: str
    block_size: int
    info: bytes
    draining: bool = False
    pool_medium: int = 0


@dataclass(frozen=True, slots=True)
class WorkerChange:
    worker: Worker
    removed: bool = False


@dataclass(frozen=True, slots=True)
class WorkerLeft:
    """An epoch's membership has ended, and with it all its blocks."""

    worker_id: str
    epoch: int
    model: str


@dataclass(frozen=True, slots=True)
class Renewal:
    """Answer to a heartbeat; not accepted means `epoch` is a later one than the caller's."""

    accepted: bool
    epoch: int
    wants_snapshot: bool


class Directory:
    """Members by name. Every change answers with what a watcher has to be told."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, worker_id: str) -> Worker | None:
        return self._workers.get(worker_id)

    def all(self) -> tuple[Worker, ...]:
        return tuple(self._workers.values())

    def put(self, worker: Worker) -> list[WorkerChange]:
        """Add a worker or change it; another epoch replaces the known one, which is told as removed first."""
        known = self._workers.get(worker.worker_id)
        if known == worker:
            return []
        self._workers[worker.worker_id] = worker
        replaced = [WorkerChange(known, removed=True)] if known and known.epoch != worker.epoch else []
        return [*replaced, WorkerChange(worker)]

    def drop(self, worker_id: str, epoch: int) -> list[WorkerChange]:
        """Remove a worker, if that epoch of it is the known one."""
        known = self._workers.get(worker_id)
        if known is None or known.epoch != epoch:
            return []
        del self._workers[worker_id]
        return [WorkerChange(known, removed=True)]

    def replace(self, workers: Iterable[Worker]) -> list[WorkerChange]:
        """Make `workers` the members."""
        wanted = {worker.worker_id: worker for worker in workers}
        gone = [worker for name, worker in self._workers.items() if name not in wanted]
        changes = [change for worker in gone for change in self.drop(worker.worker_id, worker.epoch)]
        return changes + [change for worker in wanted.values() for change in self.put(worker)]


class Leases:
    """Ends of the leases renewed through this replica, in seconds of the caller's monotonic clock."""

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self._ends: dict[str, float] = {}

    def renew(self, worker_id: str, now_s: float) -> None:
        self._ends[worker_id] = now_s + self.lease_s

    def end(self, worker_id: str) -> None:
        self._ends.pop(worker_id, None)

    def live(self, now_s: float) -> frozenset[str]:
        return frozenset(name for name, end in self._ends.items() if end > now_s)

    def left_s(self, now_s: float) -> dict[str, float]:
        """Seconds left of each."""
        return {name: max(0.0, end - now_s) for name, end in self._ends.items()}

    def expire(self, now_s: float) -> list[str]:
        """Forget and return the leases that are over."""
        over = [name for name, end in self._ends.items() if end <= now_s]
        for name in over:
            del self._ends[name]
        return over
