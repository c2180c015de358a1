"""The default policy: one predicted cost in milliseconds for every way to run a request, and the least of them.

    pair   queue(p) + load(p) + adapter(p) + prefill(p) + transfer(p, d) + adapter(d) + seat(d) + decode(d)
    alone  queue(d) + load(d) + adapter(d) + prefill(d)                               + seat(d) + decode(d)

`decode` is what the next `horizon_tokens` gaps take. A cached prefix counts for the milliseconds it saves, so requests
stick to theirs as far as it pays, and no further. `adapter` is what it takes to bring the request's LoRA adapter into a
slot, `adapter_weight` times: the sequences in that step wait as well, and what it pushes out of the slot comes back.

Ways that would break the inter-token SLO, of this sequence or of those already running on the worker, are taken only
where there is no other, and those that would break both last of all: a decode worker whose steps are too long is not
given prompts that make them longer. Beside prefill workers, a decode worker computes a prompt only where it does not
hold up the others there for longer than the SLO allows, and only once the times of prompts are learned rather than
believed.

Learned times are no more exact than `alike`. Steps that last longer than the shortest by no more than that share count
as long as it. Of decode workers that differ from the cheapest in nothing but learned times, and there by no more than
that share, the one with the fewest sequences is taken: workers that are equal would else be told apart by noise.
"""

from dataclasses import dataclass

import numpy as np
from pydantic import Field

from omni_proxy.scheduling.decision import NO_COSTS, TIER, Decision, LegCosts, Reason, Taken, eligible, foreseen
from omni_proxy.scheduling.kernels import cheapest_pair, decode_costs, freest
from omni_proxy.scheduling.plugins import Parameters
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.view import Bools, FleetView, Floats, Rows


class CostParameters(Parameters):
    horizon_tokens: float = Field(16.0, ge=0, description="So many gaps between tokens count towards the cost")
    stall_steps: float = Field(
        3.0, ge=1, description="A step with a prompt in it may last so many ITL SLOs, or so many ordinary steps"
    )
    stall_tokens: float = Field(
        64.0,
        ge=1,
        description="The ITL SLO is of the mean of so many gaps, which prompts beside them may lengthen",
    )
    min_confidence: float = Field(
        0.5, ge=0, le=1, description="Of the prompts' times, for a decode worker to compute one beside prefill workers"
    )
    disaggregate_min_tokens: int | None = Field(
        0, ge=0, description="Fewer uncached tokens are never prefilled apart; null: none are"
    )
    max_prefills: int = Field(8, ge=1, description="Of the cheapest, to be paired with every decode worker")
    adapter_weight: float = Field(
        2.0, ge=0, description="What bringing an adapter into a slot costs, in times of how long it takes"
    )
    alike: float = Field(
        0.05, ge=0, le=1, description="Learned times of decode workers that differ by so little are equal"
    )


@dataclass(frozen=True, slots=True)
class _Seats:
    """Decoding on each of `rows`: what comes after the blocks are there, by candidate."""

    rows: Rows
    after_ms: Floats
    """Seat and steps."""
    penalty: Floats
    """Where steps get too long."""


class CostPolicy:
    """Stateless; see the module."""

    name = "cost"

    def __init__(self, parameters: CostParameters | None = None) -> None:
        self._parameters = parameters or CostParameters.model_validate({})

    def choose(self, request: SchedulingRequest, view: FleetView) -> Decision:
        prefills, decodes = eligible(request, view)
        seats = self._seats(request, view, decodes)
        if not request.may_prefill:
            return self._continued(request, view, seats)
        first_ms = self._waiting_ms(request, view) + view.times.prefill_ms
        alone, best_alone = self._alone(request, view, seats, first_ms)
        pair = self._pair(request, view, prefills, seats, first_ms)
        least, row = self._parameters.disaggregate_min_tokens, int(decodes[best_alone])
        is_short = least is None or self._uncached(request, view, row) < least
        if pair is None or is_short:
            reason = Reason.NO_PREFILL if not len(prefills) else Reason.SHORT if is_short else Reason.NO_CONNECTOR
            return self._decided(view, request, None, row, reason, alone=alone)
        first, second, p, d, transfer_ms = pair
        if alone.value.min() < first.value.min():
            return self._decided(view, request, None, row, Reason.CHEAPER_ALONE, first, second, alone)
        return self._decided(view, request, p, d, Reason.DISAGGREGATED, first, second, alone, transfer_ms)

    def _seats(self, request: SchedulingRequest, view: FleetView, decodes: Rows) -> _Seats:
        times, of = view.times, self._parameters
        slo_ms = np.inf if request.slo.itl_ms is None else float(request.slo.itl_ms)
        costs = decode_costs(times.step_ms, times.seat_ms, decodes, of.horizon_tokens, of.alike, slo_ms, TIER)
        return _Seats(decodes, *costs)

    def _alone(
        self, request: SchedulingRequest, view: FleetView, seats: _Seats, first_ms: Floats
    ) -> tuple[LegCosts, int]:
        """Costs, and the position of the worker that would be taken."""
        times, rows = view.times, seats.rows
        if times.confidence.max() < self._parameters.min_confidence:
            stalls = np.ones(len(rows), np.bool_)
        else:
            stalls = self._stalls(request, view, rows)
        penalty = seats.penalty + TIER * stalls
        terms = {
            "queue_ms": times.queue_ms,
            "load_ms": view.load_ms,
            "prefill_ms": times.prefill_ms,
            "seat_ms": times.seat_ms,
            "step_ms": times.step_ms,
            "stall_ms": times.stall_ms,
        }
        if request.adapter:
            terms["adapter_ms"] = self._adapter_ms(view)
        after_ms = seats.after_ms + penalty
        costs = LegCosts(rows, first_ms[rows] + after_ms, Taken(rows, terms))
        waiting_ms = self._waiting_ms(request, view)[rows] + after_ms
        return costs, self._freest(view, rows, costs.value, waiting_ms, times.prefill_ms[rows])

    def _stalls(self, request: SchedulingRequest, view: FleetView, decodes: Rows) -> Bools:
        """Where computing the prompt would hold up the sequences that run, or begin meanwhile, for too long."""
        times, parameters, slo_ms = view.times, self._parameters, request.slo.itl_ms
        step_ms, stall_ms = times.step_ms[decodes], times.stall_ms[decodes]
        if slo_ms is None:
            return stall_ms > parameters.stall_steps * step_ms
        beside_ms = times.queue_ms[decodes] + times.prefill_ms[decodes]
        mean_ms = step_ms + beside_ms / parameters.stall_tokens
        return (mean_ms > slo_ms) | (stall_ms > parameters.stall_steps * slo_ms)

    def _pair(
        self, request: SchedulingRequest, view: FleetView, prefills: Rows, seats: _Seats, first_ms: Floats
    ) -> tuple[LegCosts, LegCosts, int, int, float] | None:
        """Costs of both legs, the cheapest pair's rows, and its transfer; None where no two can pair."""
        times, decodes, most = view.times, seats.rows, self._parameters.max_prefills
        rows, can = prefills, view.can_pair(prefills, decodes)
        if not can.all():
            able = can.any(axis=1)
            rows, can = prefills[able], can[able]
        if not len(rows):
            return None
        if len(rows) > most:
            nearest = np.sort(np.argpartition(first_ms[rows], most)[:most])
            rows, can = rows[nearest], can[nearest]
        transfer_ms = times.transfer_ms(rows, decodes)
        after_ms = seats.after_ms + seats.penalty
        if request.adapter:
            after_ms = after_ms + self._adapter_ms(view)[decodes]
        p, value = cheapest_pair(first_ms[rows], after_ms, transfer_ms, can)
        handoff_ms = np.where(can[p], transfer_ms[p] + after_ms, np.inf)
        d = self._freest(view, decodes, handoff_ms, after_ms, transfer_ms[p])
        first = {
            "queue_ms": times.queue_ms,
            "load_ms": view.load_ms,
            "prefill_ms": times.prefill_ms,
            "cached_tokens": view.cached_tokens,
        }
        second = {
            "transfer_ms": transfer_ms[p],
            "seat_ms": times.seat_ms[decodes],
            "step_ms": times.step_ms[decodes],
        }
        if request.adapter:
            first["adapter_ms"] = adapter_ms = self._adapter_ms(view)
            second["adapter_ms"] = adapter_ms[decodes]
        return (
            LegCosts(rows, value, Taken(rows, first)),
            LegCosts(decodes, handoff_ms, second),
            int(rows[p]),
            int(decodes[d]),
            float(transfer_ms[p, d]),
        )

    def _waiting_ms(self, request: SchedulingRequest, view: FleetView) -> Floats:
        """What each worker costs before it begins to compute the prompt."""
        waiting_ms = view.times.queue_ms + view.load_ms
        return waiting_ms + self._adapter_ms(view) if request.adapter else waiting_ms

    def _adapter_ms(self, view: FleetView) -> Floats:
        return self._parameters.adapter_weight * view.adapter_ms

    def _freest(self, view: FleetView, rows: Rows, cost: Floats, known_ms: Floats, learned_ms: Floats) -> int:
        """Position of the cheapest, or of one like it with fewer sequences; see the module."""
        load = view.cached_tokens, view.own_requests, view.others_sequences, view.dispatched
        return freest(cost, known_ms, learned_ms, self._parameters.alike, rows, *load)

    def _continued(self, request: SchedulingRequest, view: FleetView, seats: _Seats) -> Decision:
        """Decode only: blocks are pulled from their holder, or the prompt and what follows is computed again."""
        times, rows = view.times, seats.rows
        holder = view.ids.index(request.held_by) if request.held_by in view.ids else None
        waiting_ms, computing_ms = (times.queue_ms + view.load_ms)[rows], times.prefill_ms[rows]
        first_ms = waiting_ms + computing_ms
        kind = request.kv_connector or None
        transfer_ms, pulls = np.zeros(len(rows)), np.array([view.connectors[row] == kind for row in rows], np.bool_)
        terms: dict[str, Floats] = {}
        if holder is not None:
            from_there = np.array([holder])
            transfer_ms = times.transfer_ms(from_there, rows)[0]
            pulls = view.can_pair(from_there, rows)[0]
            terms = {"transfer_ms": np.where(pulls, transfer_ms, 0.0), "first_ms": np.where(pulls, 0.0, first_ms)}
        elif not request.kv_connector:
            terms = {"first_ms": first_ms}
        terms |= {"seat_ms": times.seat_ms[rows], "step_ms": times.step_ms[rows]}
        after_ms = seats.after_ms + seats.penalty
        if request.adapter:
            terms["adapter_ms"] = adapter_ms = self._adapter_ms(view)[rows]
            after_ms = after_ms + adapter_ms
        costs = LegCosts(rows, np.where(pulls, transfer_ms, first_ms) + after_ms, terms)
        known_ms, learned_ms = after_ms + np.where(pulls, 0.0, waiting_ms), np.where(pulls, transfer_ms, computing_ms)
        best = self._freest(view, rows, costs.value, known_ms, learned_ms)
        moving_ms, is_pull = float(transfer_ms[best]) if pulls[best] else 0.0, bool(pulls[best])
        decode = int(rows[best])
        return self._decided(
            view, request, None, decode, Reason.CONTINUED, second=costs, transfer_ms=moving_ms, pulls=is_pull
        )

    def _uncached(self, request: SchedulingRequest, view: FleetView, row: int) -> int:
        return max(0, request.prompt_tokens - int(view.cached_tokens[row]))

    def _decided(
        self,
        view: FleetView,
        request: SchedulingRequest,
        prefill: int | None,
        decode: int,
        reason: Reason,
        first: LegCosts = NO_COSTS,
        second: LegCosts = NO_COSTS,
        alone: LegCosts = NO_COSTS,
        transfer_ms: float = 0.0,
        *,
        pulls: bool = False,
    ) -> Decision:
        return Decision(
            prefill=None if prefill is None else view.ids[prefill],
            decode=view.ids[decode],
            reason=reason,
            uncached_tokens=self._uncached(request, view, decode if prefill is None else prefill),
            policy=self.name,
            ids=view.ids,
            prefill_costs=first,
            decode_costs=second,
            alone_costs=alone,
            prediction=foreseen(view, prefill, decode, transfer_ms=transfer_ms, pulls=pulls),
        )
