"""Numbers of every worker in arrays, one slot each, so that a view of the fleet is a few array reads.

A slot belongs to one worker id from its first mention until it is let go. Whoever writes a column owns it: the ledger
`own_*`, the fleet what workers report.
"""

import numpy as np

from omni_proxy.scheduling.view import Floats, Ints

_FIRST_SLOTS = 16
INTS = (
    "own_requests", "own_prefills", "own_uncached_tokens", "own_output_tokens", "dispatched",
    "others_prefills", "others_uncached_tokens", "others_sequences", "running", "waiting", "context_tokens",
)  # fmt: skip
(
    OWN_REQUESTS, OWN_PREFILLS, OWN_UNCACHED_TOKENS, OWN_OUTPUT_TOKENS, DISPATCHED,
    OTHERS_PREFILLS, OTHERS_UNCACHED_TOKENS, OTHERS_SEQUENCES, RUNNING, WAITING, CONTEXT_TOKENS,
) = range(len(INTS))  # fmt: skip
"""Rows of `Columns.ints`."""
_FLOATS = {
    "own_work": (3,), "own_load_ms": (), "own_answers": (2,), "busy_since_s": (), "kv_usage": (), "stats_at_s": (),
}  # fmt: skip
"""Shapes of a slot's entry."""


class Columns:
    """Arrays are replaced when they grow: read them through the attribute every time."""

    ints: Ints
    """All columns of whole numbers, one row each, so that a view takes them in one go."""
    own_requests: Ints
    own_prefills: Ints
    own_uncached_tokens: Ints
    own_output_tokens: Ints
    own_work: Floats
    """Features of the prompts in flight, summed; see `omni_proxy.scheduling.times`."""
    own_load_ms: Floats
    """What bringing the adapters of these prompts into slots takes, summed."""
    own_answers: Floats
    """Legs in flight that generate, and the tokens expected of them from their first to their last."""
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
            self.ints[:, slot] = 0
            for name in _FLOATS:
                getattr(self, name)[slot] = 0.0
            self._free.append(slot)

    def _grow(self, capacity: int) -> None:
        held = self.capacity
        ints = np.zeros((len(INTS), capacity), np.int64)
        if held:
            ints[:, :held] = self.ints
        self.ints = ints
        for name, row in zip(INTS, ints, strict=True):
            setattr(self, name, row)
        for name, shape in _FLOATS.items():
            grown = np.zeros((capacity, *shape))
            if held:
                grown[:held] = getattr(self, name)
            setattr(self, name, grown)
        # The lowest slot is taken first.
        self._free[:0] = range(capacity - 1, held - 1, -1)
        self.capacity = capacity
