"""One priority: its tenants' lanes, and whose turn it is.

Levels only grow, on a scale that grows too: service at time t counts 2 ** ((t - origin) / half life), so the order of
the lanes does not change while nobody is served, and halving older service touches nothing.
"""

import heapq
from collections import OrderedDict
from collections.abc import Container, Iterator

from omni_proxy.flow.fairness import Fairness
from omni_proxy.flow.lane import Entry, Lane
from omni_proxy.flow.orders import Order
from omni_proxy.flow.settings import BandSettings

AGING_EVERY = 32
"""Each so many releases of a band the lane that has waited longest since its last one has the turn, if it has aged.

Else a tenant that had much service would wait for ever while new ones keep coming."""
_MAX_IDLE = 1024
"""Tenants without waiting requests whose service is remembered."""
_MAX_EXPONENT = 256.0
_SLACK = 64


class Band:
    def __init__(
        self, settings: BandSettings, order: Order, fairness: Fairness, half_life_s: float, patience_s: float
    ) -> None:
        """A lane that has had no turn for `patience_s` has aged."""
        self.settings = settings
        self.size_bytes = 0
        self.requests = 0
        self.order = order
        self._fairness = fairness
        self._half_life_s = half_life_s
        self._patience_s = patience_s
        self._origin_s: float | None = None
        self._active: OrderedDict[str, Lane] = OrderedDict()
        """The lane that has waited longest since its last release, or since it became active, is the first."""
        self._idle: OrderedDict[str, Lane] = OrderedDict()
        self._turns: list[tuple[float, int, int, Lane]] = []
        self._ticks = 0
        self._releases = 0
        self._floor = 0.0
        self._by_age: OrderedDict[int, Entry] = OrderedDict()

    @property
    def priority(self) -> int:
        return self.settings.priority

    @property
    def ceiling(self) -> float:
        return 1 - self.settings.hold_back

    @property
    def tenants(self) -> int:
        """With waiting requests."""
        return len(self._active)

    @property
    def known_tenants(self) -> int:
        return len(self._active) + len(self._idle)

    def lane_of(self, tenant: str) -> Lane | None:
        """The lane of a tenant with waiting requests."""
        return self._active.get(self._key(tenant))

    def newest_first(self) -> Iterator[Entry]:
        return reversed(self._by_age.values())

    def add(self, entry: Entry) -> None:
        lane = self._lane(entry.ticket.tenant)
        was_idle = not lane
        lane.add(entry)
        self._by_age[entry.seq] = entry
        self.requests += 1
        self.size_bytes += entry.ticket.size_bytes
        if was_idle:
            if not self._fairness.keeps_credit:
                lane.attained = max(lane.attained, self._floor * lane.weight)
            lane.ages_s = entry.ages_s
            self._active[lane.tenant] = lane
            self._place(lane)

    def head(self, now: float, passed: Container[str] = ()) -> Entry | None:
        """The entry whose turn it is, those left out whose adapters are `passed`. Asked twice at one instant, it is the
        same.
        """
        if not self._active:
            return None
        if passed:
            return self._head_beside(now, passed)
        if self._releases % AGING_EVERY == AGING_EVERY - 1:
            longest = next(iter(self._active.values()))
            if longest.ages_s <= now:
                return longest.head(now)
        while True:
            _, _, stamp, lane = self._turns[0]
            if lane and lane.stamp == stamp:
                return lane.head(now)
            heapq.heappop(self._turns)

    def _head_beside(self, now: float, passed: Container[str]) -> Entry | None:
        """The same order, looked through lane by lane."""
        if self._releases % AGING_EVERY == AGING_EVERY - 1:
            longest = next((lane for lane in self._active.values() if lane.waits_beside(passed)), None)
            if longest is not None and longest.ages_s <= now:
                return longest.head(now, passed)
        turns = (turn for turn in self._turns if turn[3].stamp == turn[2] and turn[3].waits_beside(passed))
        first = min(turns, default=None)
        return None if first is None else first[3].head(now, passed)

    def release(self, entry: Entry, now: float) -> None:
        """Its turn is taken: it leaves, and its tenant is charged."""
        lane = entry.lane
        assert lane is not None
        self._floor = max(self._floor, lane.level)
        self._releases += 1
        lane.releases += 1
        lane.ages_s = now + self._patience_s
        self._active.move_to_end(lane.tenant)
        scale = self._scale(now)  # which may change what lanes have attained
        lane.attained += self._fairness.service(entry.ticket) * scale
        self.drop(entry)
        if lane:
            self._place(lane)

    def drop(self, entry: Entry) -> None:
        """It leaves without having been served."""
        lane = entry.lane
        assert lane is not None
        lane.drop(entry)
        del self._by_age[entry.seq]
        self.requests -= 1
        self.size_bytes -= entry.ticket.size_bytes
        if not lane:
            del self._active[lane.tenant]
            self._remember(lane)

    def charge(self, tenant: str, service: float, weight: float, now: float) -> None:
        """Service outside a turn; less than 0 gives back what was charged too much at that time."""
        scale = self._scale(now)  # before the lane is taken from those that it changes
        lane = self._lane(tenant)
        if not lane:
            lane.weight = weight
        lane.attained = max(0.0, lane.attained + service * scale)
        if lane:
            self._place(lane)
        else:
            self._remember(lane)

    def inherit(self, other: "Band", now: float) -> None:
        """Take over what tenants have attained in the band of an earlier configuration, if it counts service alike."""
        if other._fairness != self._fairness:
            return
        scale = self._scale(now) / other._scale(now)
        self._floor = other._floor * scale
        for lane in (*other._idle.values(), *other._active.values()):
            mine = self._lane(lane.tenant)
            mine.weight, mine.attained = lane.weight, lane.attained * scale
            self._remember(mine)

    def _key(self, tenant: str) -> str:
        return tenant if self._fairness.by_tenant else ""

    def _lane(self, tenant: str) -> Lane:
        key = self._key(tenant)
        if (lane := self._active.get(key)) is not None:
            return lane
        lane = self._idle.pop(key, None)
        return Lane(key) if lane is None else lane

    def _remember(self, lane: Lane) -> None:
        self._idle[lane.tenant] = lane
        if len(self._idle) > _MAX_IDLE:
            self._idle.popitem(last=False)

    def _place(self, lane: Lane) -> None:
        """Give an active lane its place by its level; the earlier one becomes void."""
        lane.stamp += 1
        self._ticks += 1
        heapq.heappush(self._turns, (lane.level, self._ticks, lane.stamp, lane))
        if len(self._turns) > 2 * len(self._active) + _SLACK:
            self._rebuild()

    def _rebuild(self) -> None:
        self._turns = [(lane.level, tick, s, lane) for _, tick, s, lane in self._turns if lane and lane.stamp == s]
        heapq.heapify(self._turns)

    def _scale(self, now: float) -> float:
        if not self._fairness.forgets:
            return 1.0
        if self._origin_s is None:
            self._origin_s = now
        exponent = (now - self._origin_s) / self._half_life_s
        if exponent > _MAX_EXPONENT:
            shrink = 2.0 ** -min(exponent, 1000.0)
            for lane in (*self._active.values(), *self._idle.values()):
                lane.attained *= shrink
            self._floor *= shrink
            self._origin_s, exponent = now, 0.0
            self._rebuild()
        return float(2.0**exponent)
