"""Numbers of every worker in arrays, one slot each, so that a view of the fleet is a few array reads.

A slot belongs to one worker id from its first mention until it is let go. Whoever writes a column owns it: the ledger
`own_*`, the fleet what workers report.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from omni_proxy.scheduling.view import Floats, Ints

_FIRST_SLOTS = 16
_COLUMNS: Mapping[str, tuple[Any, tuple[int, ...]]] = {
    "own_requests": (np.int64, ()),
    "own_prefills": (np.int64, ()),
    "own_uncached_tokens": (np.int64, ()),
    "own_output_tokens": (np.int64, ()),
    "own_work": (np.float64, (3,)),
    "busy_since_s": (np.float64, ()),
    "dispatched": (np.int64, ()),
    "others_prefills": (np.int64, ()),
    "others_uncached_tokens": (np.int64, ()),
    "others_sequences": (np.int64, ()),
    "running": (np.int64, ()),
    "waiting": (np.int64, ()),
    "kv_usage": (np.float64, ()),
    "context_tokens": (np.int64, ()),
    "stats_at_s": (np.float64, ()),
}


class Columns:
    """Arrays are replaced when they grow: read them through the attribute every time."""

    own_requests: Ints
    own_prefills: Ints
    own_uncached_tokens: Ints
    own_output_tokens: Ints
    own_work: Floats
    """Features of the prompts in flight, summed; see `omni_proxy.scheduling.times`."""
    busy_since_s: Floats
    """When the worker began with the first of this proxy's prompts that it has not answered."""
    dispatched: Ints
    others_prefills: Ints
    others_uncached_tokens: Ints
    others_sequences: Ints
    running: Ints
    waiting: Ints
    kv_usage: Floats
    context_tokens: Ints
    stats_at_s: Floats

    def __init__(self) -> None:
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self.capacity = 0
        self._grow(_FIRST_SLOTS)

    def slot(self, worker_id: str) -> int:
        """The worker's slot, taken now if it has none."""
        slot = self._slots.get(worker_id)
        if slot is None:
            if not self._free:
                self._grow(2 * self.capacity)
            slot = self._slots[worker_id] = self._free.pop()
        return slot

    def get(self, worker_id: str) -> int | None:
        return self._slots.get(worker_id)

    def let_go(self, worker_id: str) -> None:
        """Forget the worker; its numbers start from zero for the next owner of the slot."""
        slot = self._slots.pop(worker_id, None)
        if slot is not None:
            for name in _COLUMNS:
                getattr(self, name)[slot] = 0
            self._free.append(slot)

    def _grow(self, capacity: int) -> None:
        for name, (kind, shape) in _COLUMNS.items():
            grown = np.zeros((capacity, *shape), kind)
            if self.capacity:
                grown[: self.capacity] = getattr(self, name)
            setattr(self, name, grown)
        # The lowest slot is taken first.
        self._free[:0] = range(capacity - 1, self.capacity - 1, -1)
        self.capacity = capacity
