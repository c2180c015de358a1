"""Whether a request that waits in the proxy would be begun soon if it were sent: what flow control asks the fleet.

There is room while some worker's predicted backlog ends within the look-ahead, and a decode worker has a seat. So
engines' own queues stay as short as the look-ahead, and a request's turn, worker and company are decided as late as
possible: at the predicted end of what the worker computes now. Prompts that together fill but a small part of a step
need not wait for each other: engines compute them at once.
"""

import math

import numpy as np

from omni_proxy.fleet import Fleet
from omni_proxy.flow.ticket import Ticket
from omni_proxy.scheduling.view import Bools, FleetView, Rows

_STEP_SHARE = 0.25
"""Of the tokens of a step that prompts may fill together without waiting for each other."""


class FleetRoom:
    def __init__(self, fleet: Fleet, lookahead_ms: float) -> None:
        self._fleet = fleet
        self.lookahead_ms = lookahead_ms

    def room_in_ms(self, ticket: Ticket) -> float:
        """0: now; inf: no worker takes work."""
        slots, _, decodes = self._fleet.usable_slots()
        if not decodes.any():
            return math.inf
        now_s, deciding = self._fleet.now(), slots[decodes]
        uncached = np.full(len(deciding), ticket.prompt_tokens)
        times = self._fleet.times.of(deciding, now_s, ticket.prompt_tokens, ticket.output_tokens, uncached)
        backlog_ms = self._fleet.times.backlog_ms(self._computing(), now_s)
        backlog_ms[self._fits_a_step(ticket)] = 0.0
        wait_ms = max(float(backlog_ms.min()), float(times.seat_ms.min()))
        return max(0.0, wait_ms - self.lookahead_ms)

    def drain_ms(self) -> float:
        """Until the least loaded worker has computed what was sent to it; inf where there is none."""
        slots = self._computing()
        return float(self._fleet.times.backlog_ms(slots, self._fleet.now()).min()) if len(slots) else math.inf

    def _fits_a_step(self, ticket: Ticket) -> Bools:
        """Where the prompt and those ahead of it are a small part of one step."""
        slots, columns = self._computing(), self._fleet.columns
        tokens = columns.own_uncached_tokens[slots] + columns.others_uncached_tokens[slots] + ticket.uncached_tokens
        fits: Bools = tokens <= _STEP_SHARE * self._fleet.times.most_batched(slots)
        return fits

    def _computing(self) -> Rows:
        slots, prefills, decodes = self._fleet.usable_slots()
        computing: Rows = slots[prefills] if prefills.any() else slots[decodes]
        return computing


def least_work(view: FleetView, prompt_tokens: int) -> tuple[int, float]:
    """Uncached tokens and predicted milliseconds of a prompt where it takes least."""
    rows = np.flatnonzero(view.prefills) if view.prefills.any() else np.flatnonzero(view.decodes)
    if not len(rows):
        return prompt_tokens, 0.0
    best = int(rows[np.argmin(view.times.prefill_ms[rows])])
    return max(0, prompt_tokens - int(view.cached_tokens[best])), float(view.times.prefill_ms[best])
