"""One tenant's waiting requests in one band."""

import heapq
from collections import OrderedDict
from dataclasses import dataclass, field

from omni_proxy.flow.orders import Key, Place
from omni_proxy.flow.ticket import Ticket

AGING_EVERY = 16
"""Each so many releases of a lane its oldest request goes if it has aged, whatever the order says."""
_SLACK = 64
"""Ended entries a heap may hold above the number of live ones."""


@dataclass(slots=True, eq=False)
class Entry:
    """A ticket's place in the queue. It stays in heaps after its end; `lane` is None then."""

    ticket: Ticket
    seq: int
    place: Place
    ages_s: float
    """From when on it is aged."""
    lane: "Lane | None" = None


@dataclass(slots=True, eq=False)
class Lane:
    """`attained` is the service its tenant has had, on the scale of the band."""

    tenant: str
    weight: float = 1.0
    attained: float = 0.0
    ages_s: float = 0.0
    """From when on it is aged, if it has no turn before."""
    stamp: int = 0
    """Of its valid place among the lanes of the band."""
    releases: int = 0
    size_bytes: int = 0
    _by_key: list[tuple[Key, int, Entry]] = field(default_factory=list)
    _hopeless: list[tuple[Key, int, Entry]] = field(default_factory=list)
    _by_age: OrderedDict[int, Entry] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._by_age)

    @property
    def level(self) -> float:
        return self.attained / self.weight

    def add(self, entry: Entry) -> None:
        entry.lane = self
        self.weight = entry.ticket.weight
        self.size_bytes += entry.ticket.size_bytes
        self._by_age[entry.seq] = entry
        heapq.heappush(self._by_key, (entry.place.key, entry.seq, entry))

    def head(self, now: float) -> Entry:
        """The entry whose turn it is; the lane is not empty."""
        if self.releases % AGING_EVERY == AGING_EVERY - 1:
            oldest = next(iter(self._by_age.values()))
            if oldest.ages_s <= now:
                return oldest
        while entry := _live_top(self._by_key):
            if entry.place.hopeless_from_s >= now:
                return entry
            key, seq, _ = heapq.heappop(self._by_key)
            heapq.heappush(self._hopeless, (key, seq, entry))
        entry = _live_top(self._hopeless)
        assert entry is not None
        return entry

    def drop(self, entry: Entry) -> None:
        """Amortised O(log n): heaps are rebuilt when most of what they hold has ended."""
        entry.lane = None
        self.size_bytes -= entry.ticket.size_bytes
        del self._by_age[entry.seq]
        if len(self._by_key) + len(self._hopeless) > 2 * len(self) + _SLACK:
            self._by_key = [item for item in self._by_key if item[2].lane is not None]
            self._hopeless = [item for item in self._hopeless if item[2].lane is not None]
            heapq.heapify(self._by_key)
            heapq.heapify(self._hopeless)


def _live_top(heap: list[tuple[Key, int, Entry]]) -> Entry | None:
    while heap:
        entry = heap[0][2]
        if entry.lane is not None:
            return entry
        heapq.heappop(heap)
    return None
