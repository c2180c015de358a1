"""One tenant's waiting requests in one band."""

import heapq
from collections import OrderedDict
from collections.abc import Container
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
class Line:
    """A lane's requests of one adapter."""

    by_age: OrderedDict[int, Entry] = field(default_factory=OrderedDict)
    _by_key: list[tuple[Key, int, Entry]] = field(default_factory=list)
    _hopeless: list[tuple[Key, int, Entry]] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        self.by_age[entry.seq] = entry
        heapq.heappush(self._by_key, (entry.place.key, entry.seq, entry))

    def head(self, now: float) -> tuple[bool, Key, int, Entry]:
        """Whether it is hopeless, its place, and the entry the order puts first; the line is not empty."""
        while entry := _live_top(self._by_key):
            if entry.place.hopeless_from_s >= now:
                return False, *self._by_key[0]
            heapq.heappush(self._hopeless, heapq.heappop(self._by_key))
        _live_top(self._hopeless)
        return True, *self._hopeless[0]

    def drop(self, entry: Entry) -> None:
        """Amortised O(log n): heaps are rebuilt when most of what they hold has ended."""
        del self.by_age[entry.seq]
        if len(self._by_key) + len(self._hopeless) > 2 * len(self.by_age) + _SLACK:
            self._by_key = [item for item in self._by_key if item[2].lane is not None]
            self._hopeless = [item for item in self._hopeless if item[2].lane is not None]
            heapq.heapify(self._by_key)
            heapq.heapify(self._hopeless)


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
    _waiting: int = 0
    _lines: dict[str, Line] = field(default_factory=dict)
    """By adapter; none is empty."""

    def __len__(self) -> int:
        return self._waiting

    @property
    def level(self) -> float:
        return self.attained / self.weight

    def add(self, entry: Entry) -> None:
        entry.lane = self
        self.weight = entry.ticket.weight
        self.size_bytes += entry.ticket.size_bytes
        self._waiting += 1
        self._lines.setdefault(entry.ticket.adapter, Line()).add(entry)

    def waits_beside(self, passed: Container[str]) -> bool:
        """Something waits whose adapter is not passed over."""
        return any(adapter not in passed for adapter in self._lines)

    def head(self, now: float, passed: Container[str] = ()) -> Entry:
        """The entry whose turn it is among those that are not passed over, of which there is one."""
        lines = [*self._lines.values()]
        if passed:
            lines = [line for adapter, line in self._lines.items() if adapter not in passed]
        if self.releases % AGING_EVERY == AGING_EVERY - 1:
            oldest = min((next(iter(line.by_age.values())) for line in lines), key=lambda entry: entry.seq)
            if oldest.ages_s <= now:
                return oldest
        return lines[0].head(now)[-1] if len(lines) == 1 else min(line.head(now) for line in lines)[-1]

    def drop(self, entry: Entry) -> None:
        entry.lane = None
        self.size_bytes -= entry.ticket.size_bytes
        self._waiting -= 1
        line = self._lines[entry.ticket.adapter]
        line.drop(entry)
        if not line.by_age:
            del self._lines[entry.ticket.adapter]


def _live_top(heap: list[tuple[Key, int, Entry]]) -> Entry | None:
    while heap:
        entry = heap[0][2]
        if entry.lane is not None:
            return entry
        heapq.heappop(heap)
    return None
