"""Which of one tenant's waiting requests goes first.

An order is a sort key, fixed when the request comes, and the instant from which a request is hopeless and yields to
the others. What has waited for half the TTL is aged (`lane.AGING_EVERY`), so no order can starve a request.
Third parties add theirs by the entry-point group `omni_proxy.orders`: a name for an `Order`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from omni_proxy.flow.ticket import Ticket

Key = tuple[float, ...]

_SIZE_WEIGHT = 2.0
"""So much later counts a request for each second that its prompt takes."""
_BATCH_S = 0.25
"""Arrivals of one such span are taken for one batch."""


@dataclass(frozen=True, slots=True)
class Order:
    """The least `key` goes first, then the earlier arrival. Keys of one order have one length."""

    key: Callable[[Ticket], Key]
    hopeless_from_s: Callable[[Ticket], float] | None = None
    """Behind all others from this instant on."""

    def place_of(self, ticket: Ticket) -> "Place":
        """Asked once, before the ticket is let in: a third party's order may raise anything."""
        hopeless_from_s = math.inf if self.hopeless_from_s is None else self.hopeless_from_s(ticket)
        return Place(tuple(map(float, self.key(ticket))), float(hopeless_from_s))


@dataclass(frozen=True, slots=True)
class Place:
    """What an order says of one ticket."""

    key: Key
    hopeless_from_s: float


def arrival(ticket: Ticket) -> Key:
    return (ticket.arrived_s,)


def first_token_deadline(ticket: Ticket) -> Key:
    """By what is due, but a shorter prompt before a longer one that is due only a little earlier: as many are in time,
    and the others wait less. Requests without a service level follow those with one, in the same manner by arrival.
    """
    size_s = _SIZE_WEIGHT * ticket.prefill_ms / 1e3
    return (ticket.ttft_deadline_s + size_s, ticket.arrived_s + size_s)


def deadline(ticket: Ticket) -> Key:
    """Of the first token, or of the whole answer where that is all that is known."""
    return (min(ticket.ttft_deadline_s, ticket.deadline_s), ticket.arrived_s)


def longest_first(ticket: Ticket) -> Key:
    return (-ticket.prefill_ms, -ticket.service)


def shortest_first(ticket: Ticket) -> Key:
    return (ticket.prefill_ms, ticket.service)


def alike_lengths(ticket: Ticket) -> Key:
    """Within a batch's span of arrivals, prompts of one power of two together."""
    return (_batch(ticket), float(max(1, ticket.uncached_tokens).bit_length()), ticket.arrived_s)


def earliest_batch(ticket: Ticket) -> Key:
    """Batch after batch as they arrived; the shortest first inside, so that the batch's mean wait is least."""
    return (_batch(ticket), *shortest_first(ticket))


def _batch(ticket: Ticket) -> float:
    return math.floor(ticket.arrived_s / _BATCH_S)


ORDERS: Mapping[str, Order] = {
    "slo": Order(first_token_deadline, hopeless_from_s=lambda t: t.latest_start_s),
    "fcfs": Order(arrival),
    "deadline": Order(deadline),
    "lpt": Order(longest_first),
    "spt": Order(shortest_first),
    "length_bucket": Order(alike_lengths),
    "earliest_batch": Order(earliest_batch),
}


def known_orders() -> Mapping[str, Order]:
    """The shipped orders and those of installed plug-ins."""
    from omni_proxy.scheduling import plugins

    return plugins.table("orders", ORDERS)
