"""The waiting requests: strict priority, then fairness among tenants, then an order inside each tenant.

    band 10  high        tenant a: r7 r9     <- nothing of a lower band goes before these
    band  0  default     tenant a: r1 r4 r5  <- the tenant with the least attained service / weight goes next;
                         tenant b: r2            in it, the request the order puts first
    band -10 sheddable   tenant c: r3 r6     <- may fill 70% of the bounds, goes while 30% of the room would be left

Pure: the clock is passed in. Offering, taking and removing cost O(log n) amortised, whatever waits.
"""

import heapq
import itertools
import math
from collections.abc import Container, Sequence

from omni_common.errors import ResourceExhausted
from omni_proxy.flow.band import Band
from omni_proxy.flow.fairness import FAIRNESS
from omni_proxy.flow.lane import Entry
from omni_proxy.flow.orders import known_orders
from omni_proxy.flow.settings import FlowSettings
from omni_proxy.flow.ticket import Ticket

_PATIENCE = 0.5
"""Share of the TTL after which what waits is aged."""
_SLACK = 64


class FlowQueue:
    """Every ticket offered ends once: popped, removed, expired, or displaced by one of a higher band."""

    def __init__(self, settings: FlowSettings) -> None:
        self._entries: dict[Ticket, Entry] = {}
        self._expiries: list[tuple[float, int, Entry]] = []
        self._seqs = itertools.count()
        self._size_bytes = 0
        self._settings = settings
        self._bands = _bands_of(settings)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def settings(self) -> FlowSettings:
        return self._settings

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def bands(self) -> Sequence[Band]:
        """The highest priority first."""
        return self._bands

    def band_of(self, ticket: Ticket) -> Band:
        """The highest band not above the ticket's priority, else the lowest."""
        return _band_among(self._bands, ticket)

    def offer(self, ticket: Ticket, now: float) -> Sequence[Ticket]:
        """Let it wait. Returns the tickets it displaced: the newest of sheddable bands below its own.

        Raises:
            ResourceExhausted: a bound is reached; `reason` says which.
        """
        band = self.band_of(ticket)
        place = band.order.place_of(ticket)
        self._check_band(band, ticket)
        displaced = self._make_room(band, ticket)
        expires_s = min(now + self._settings.ttl_s, ticket.deadline_s)
        entry = Entry(ticket, next(self._seqs), place, now + _PATIENCE * self._settings.ttl_s)
        self._entries[ticket] = entry
        self._size_bytes += ticket.size_bytes
        band.add(entry)
        heapq.heappush(self._expiries, (expires_s, entry.seq, entry))
        return displaced

    def head(self, now: float, passed: Container[str] = ()) -> Ticket | None:
        """The ticket whose turn it is, those left out whose adapters are `passed`."""
        for band in self._bands:
            if (entry := band.head(now, passed)) is not None:
                return entry.ticket
        return None

    def take(self, ticket: Ticket, now: float) -> None:
        """It has its turn: it leaves, and its tenant is charged."""
        self.band_of(ticket).release(self._forget(ticket), now)

    def pop(self, now: float, saturation: float = 0.0) -> Ticket | None:
        """Take the head and charge its tenant; None while its band has to hold back.

        `saturation` is the share of the workers' room in use. A band that holds back holds those below it too.
        """
        ticket = self.head(now)
        if ticket is None:
            return None
        band = self.band_of(ticket)
        if band.settings.hold_back and saturation >= band.ceiling:
            return None
        self.take(ticket, now)
        return ticket

    def remove(self, ticket: Ticket) -> bool:
        """False if it does not wait any more."""
        if ticket not in self._entries:
            return False
        self.band_of(ticket).drop(self._forget(ticket))
        return True

    def expire(self, now: float) -> Sequence[Ticket]:
        """Take out what has waited too long."""
        gone: list[Ticket] = []
        while (at := self.next_expiry_s) is not None and at <= now:
            gone.append(self._expiries[0][2].ticket)
            self.remove(gone[-1])
        return gone

    @property
    def next_expiry_s(self) -> float | None:
        while self._expiries and self._expiries[0][2].lane is None:
            heapq.heappop(self._expiries)
        return self._expiries[0][0] if self._expiries else None

    def pass_by(self, ticket: Ticket, now: float) -> None:
        """Charge the tenant of a ticket that did not have to wait."""
        self.settle(ticket, self._service(ticket), now)

    def settle(self, ticket: Ticket, service: float, now: float) -> None:
        """Correct what a ticket's tenant was charged, by so many prompt tokens."""
        if FAIRNESS[self._settings.fairness].forgets:
            self.band_of(ticket).charge(ticket.tenant, service, ticket.weight, now)

    def ahead_of(self, ticket: Ticket) -> float:
        """How many waiting tickets would go before it: all of higher bands, and its own band's fair share."""
        ahead = 0.0
        own = self.band_of(ticket)
        for band in self._bands:
            if band is own:
                lane = band.lane_of(ticket.tenant)
                return ahead + min(band.requests, ((len(lane) if lane else 0) + 1) * max(1, band.tenants))
            ahead += band.requests
        return ahead

    def reconfigure(self, settings: FlowSettings, now: float) -> None:
        """Move all tickets to the bands and orders of `settings`. None is lost, even above new bounds.

        What an order raises of a ticket is raised before anything has changed.
        """
        bands, waiting = _bands_of(settings), sorted(self._entries.values(), key=lambda e: e.seq)
        places = [_band_among(bands, entry.ticket).order.place_of(entry.ticket) for entry in waiting]
        known = {band.settings.priority: band for band in self._bands}
        self._settings, self._bands = settings, bands
        for band in bands:
            if (before := known.get(band.settings.priority)) is not None:
                band.inherit(before, now)
        for entry, place in zip(waiting, places, strict=True):
            entry.place = place
            self.band_of(entry.ticket).add(entry)

    def _forget(self, ticket: Ticket) -> Entry:
        entry = self._entries.pop(ticket)
        self._size_bytes -= ticket.size_bytes
        if len(self._expiries) > 2 * len(self._entries) + _SLACK:
            # The entry itself is still live here: its band ends it next.
            self._expiries = [item for item in self._expiries if item[2].lane is not None]
            heapq.heapify(self._expiries)
        return entry

    def _service(self, ticket: Ticket) -> float:
        return FAIRNESS[self._settings.fairness].service(ticket)

    def _check_band(self, band: Band, ticket: Ticket) -> None:
        own, common = band.settings, self._settings
        requests, size = band.requests + 1, band.size_bytes + ticket.size_bytes
        if requests > (own.max_requests or math.inf) or size > (own.max_bytes or math.inf):
            raise ResourceExhausted(f"the queue of band {own.name!r} is full", reason="band_full")
        lane = band.lane_of(ticket.tenant)
        waiting, size = (len(lane), lane.size_bytes) if lane else (0, 0)
        if waiting >= common.max_tenant_requests or size + ticket.size_bytes > common.max_tenant_bytes:
            raise ResourceExhausted(f"{waiting} requests of this tenant wait already", reason="tenant_queue_full")

    def _make_room(self, band: Band, ticket: Ticket) -> Sequence[Ticket]:
        """Displace sheddable tickets of lower bands, the lowest and newest first, until the common bounds hold."""
        if self._fits(band, ticket, 0, 0):
            return ()
        lower = [b for b in reversed(self._bands) if b.settings.is_sheddable and b.settings.priority < band.priority]
        if not self._fits(band, ticket, sum(b.requests for b in lower), sum(b.size_bytes for b in lower)):
            whole = self._settings
            reason = "queue_full"
            if len(self) < whole.max_requests and self._size_bytes + ticket.size_bytes <= whole.max_bytes:
                reason = "held_back"
            raise ResourceExhausted(f"{len(self)} requests wait for a worker already", reason=reason)
        displaced: list[Ticket] = []
        freed = 0
        for entry in itertools.chain.from_iterable(b.newest_first() for b in lower):
            displaced.append(entry.ticket)
            freed += entry.ticket.size_bytes
            if self._fits(band, ticket, len(displaced), freed):
                break
        for victim in displaced:
            self.remove(victim)
        return displaced

    def _fits(self, band: Band, ticket: Ticket, leaving: int, freed: int) -> bool:
        share = band.ceiling
        return (
            len(self) - leaving + 1 <= share * self._settings.max_requests
            and self._size_bytes - freed + ticket.size_bytes <= share * self._settings.max_bytes
        )


def _band_among(bands: Sequence[Band], ticket: Ticket) -> Band:
    return next((b for b in bands if b.settings.priority <= ticket.priority), bands[-1])


def _bands_of(settings: FlowSettings) -> Sequence[Band]:
    orders, fairness = known_orders(), FAIRNESS[settings.fairness]
    return [
        Band(own, orders[own.order or settings.order], fairness, settings.half_life_s, _PATIENCE * settings.ttl_s)
        for own in sorted(settings.bands, key=lambda b: -b.priority)
    ]
