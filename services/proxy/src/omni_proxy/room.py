"""Whether a request that waits in the proxy would be begun soon if it were sent: what flow control asks the fleet.

There is room while some worker's predicted backlog ends within the look-ahead, and a decode worker has a seat and keeps
the inter-token SLO with one more sequence. So
engines' own queues stay as short as the look-ahead, and a request's turn, worker and company are decided as late as
possible: at the predicted end of what the worker computes now. Prompts that together fill but a small part of a step
need not wait for each other: engines compute them at once. A worker of a kind that nothing is known of gets one prompt,
and more when the first is answered.
"""

import math
from collections.abc import Hashable

import numpy as np

from omni_proxy.fleet import Fleet
from omni_proxy.flow.ticket import Ticket
from omni_proxy.scheduling.view import FleetView, Rows

_STEP_SHARE = 0.25
"""Of the tokens of a step that prompts may fill together without waiting for each other."""


class FleetRoom:
    def __init__(self, fleet: Fleet, lookahead_ms: float) -> None:
        self._fleet = fleet
        self.lookahead_ms = lookahead_ms

    def room_in_ms(self, ticket: Ticket) -> float:
        """0: now; inf: no worker takes work."""
        deciding = self._fleet.deciding_slots(ticket.adapter)
        if not len(deciding):
            return math.inf
        wait_ms = max(self._prompt_ms(ticket), self._seat_ms(ticket, deciding))
        return max(0.0, wait_ms - self.lookahead_ms)

    def drain_ms(self, adapter: str = "") -> float:
        """Until the least loaded worker has computed what was sent to it; inf: no worker takes work."""
        if not len(self._fleet.deciding_slots(adapter)):
            return math.inf
        return float(self._fleet.times.free_in_ms(self._fleet.computing_slots(adapter), self._fleet.now()).min())

    def takers(self, adapter: str) -> Hashable:
        """Equal for adapters that the same workers serve, and unlike any other's where nobody does."""
        return self._fleet.takers(adapter)

    def is_short_of_decode(self, ticket: Ticket) -> bool:
        """A seat or the pace of a decode worker, and not a prompt's turn, is what the ticket waits for."""
        deciding = self._fleet.deciding_slots(ticket.adapter)
        if not len(deciding):
            return False
        return self._seat_ms(ticket, deciding) > max(self._prompt_ms(ticket), self.lookahead_ms)

    def _prompt_ms(self, ticket: Ticket) -> float:
        """Until a worker has computed what is ahead; 0 where that and the prompt are a small part of one step."""
        slots, times = self._fleet.computing_slots(ticket.adapter), self._fleet.times
        if times.begins_in_a_step(slots, ticket.uncached_tokens, _STEP_SHARE):
            return 0.0
        return float(times.free_in_ms(slots, self._fleet.now()).min())

    def _seat_ms(self, ticket: Ticket, slots: Rows) -> float:
        """Until a decode worker has a seat, and keeps the SLO with one more sequence."""
        times, tokens = self._fleet.times, ticket.prompt_tokens + ticket.output_tokens
        seats = slots[times.have_seats(slots, tokens)]
        if len(seats):
            return 0.0 if ticket.itl_slo_ms is None else self._pace_ms(ticket, ticket.itl_slo_ms, seats)
        uncached = np.full(len(slots), ticket.prompt_tokens)
        of = times.of(slots, self._fleet.now(), ticket.prompt_tokens, ticket.output_tokens, uncached)
        return float(of.seat_ms.min())

    def _pace_ms(self, ticket: Ticket, itl_slo_ms: float, slots: Rows) -> float:
        # Shared out to all decode workers, whatever this ticket's adapter.
        coming = self._fleet.coming() / len(self._fleet.deciding_slots())
        pace_ms = self._fleet.times.pace_ms(slots, ticket.prompt_tokens, ticket.output_tokens, coming, itl_slo_ms)
        return float(pace_ms.min())


def least_work(view: FleetView, prompt_tokens: int) -> tuple[int, float]:
    """Uncached tokens and predicted milliseconds of a prompt where it takes least."""
    rows = np.flatnonzero(view.prefills)
    rows = rows if len(rows) else np.flatnonzero(view.decodes)
    if not len(rows):
        return prompt_tokens, 0.0
    best = int(rows[np.argmin(view.times.prefill_ms[rows])])
    return max(0, prompt_tokens - int(view.cached_tokens[best])), float(view.times.prefill_ms[best])
