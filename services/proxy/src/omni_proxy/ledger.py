"""What this proxy has in flight on each worker. The only writer of own load."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class InFlight:
    """Charged on dispatch, settled when the leg answers or ends."""

    requests: int = 0
    uncached_tokens: int = 0
    dispatched: int = 0


class Ledger:
    def __init__(self) -> None:
        self._entries: dict[str, InFlight] = {}

    def of(self, worker_id: str) -> InFlight:
        """A copy of the worker's entry."""
        entry = self._entries.get(worker_id)
        return InFlight() if entry is None else InFlight(entry.requests, entry.uncached_tokens, entry.dispatched)

    @contextmanager
    def charge(self, worker_id: str, uncached_tokens: int = 0) -> Iterator[None]:
        """Hold one request and its uncached prompt tokens against a worker."""
        entry = self._entries.setdefault(worker_id, InFlight())
        entry.requests += 1
        entry.dispatched += 1
        entry.uncached_tokens += uncached_tokens
        try:
            yield
        finally:
            entry.requests -= 1
            entry.uncached_tokens -= uncached_tokens

    def forget(self, worker_id: str) -> None:
        """Drop the entry of a worker that is gone, unless something still runs there."""
        entry = self._entries.get(worker_id)
        if entry is not None and entry.requests == 0:
            del self._entries[worker_id]

    @property
    def total_requests(self) -> int:
        return sum(entry.requests for entry in self._entries.values())
