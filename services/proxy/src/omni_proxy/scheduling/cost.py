"""The default policy: one predicted cost in milliseconds for every way to run a request, and the least of them.

    pair   queue(p) + load(p) + prefill(p) + transfer(p, d) + seat(d) + decode(d)
    alone  queue(d) + load(d) + prefill(d)                  + seat(d) + decode(d)

`decode` is what the next `horizon_tokens` gaps take. A cached prefix counts for the milliseconds it saves, so requests
stick to theirs as far as it pays, and no further.

Ways that would break the inter-token SLO, of this sequence or of those already running on the worker, are taken only
where there is no other. Beside prefill workers, a decode worker computes a prompt only where it does not hold up the
others there for longer than the SLO allows, and only once the times of prompts are learned rather than believed.
"""

from dataclasses import replace

import numpy as np
from pydantic import Field

from omni_proxy.scheduling.decision import TIER, Decision, LegCosts, Prediction, Reason, eligible
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


class CostPolicy:
    """Stateless; see the module."""

    name = "cost"

    def __init__(self, parameters: CostParameters | None = None) -> None:
        self._parameters = parameters or CostParameters.model_validate({})

    def choose(self, request: SchedulingRequest, view: FleetView) -> Decision:
        prefills, decodes = eligible(request, view)
        decode_ms, keeps_itl = self._decode(request, view, decodes)
        if not request.may_prefill:
            return self._continued(request, view, decodes, decode_ms, keeps_itl)
        first_ms = view.times.queue_ms + view.load_ms + view.times.prefill_ms
        alone = self._alone(request, view, decodes, first_ms, decode_ms, keeps_itl)
        pair = self._pair(request, view, prefills, decodes, first_ms, decode_ms, keeps_itl)
        best_alone = int(np.argmin(alone.value))
        least = self._parameters.disaggregate_min_tokens
        is_short = least is None or int(view.uncached_tokens(request)[decodes[best_alone]]) < least
        if pair is None or is_short:
            reason = Reason.NO_PREFILL if not len(prefills) else Reason.SHORT if is_short else Reason.NO_CONNECTOR
            return self._decided(view, request, None, int(decodes[best_alone]), reason, alone=alone)
        costs, second, p, d, transfer_ms = pair
        if alone.value[best_alone] < costs.value.min():
            row = int(decodes[best_alone])
            return self._decided(view, request, None, row, Reason.CHEAPER_ALONE, costs, second, alone)
        return self._decided(view, request, p, d, Reason.DISAGGREGATED, costs, second, alone, transfer_ms)

    def _decode(self, request: SchedulingRequest, view: FleetView, decodes: Rows) -> tuple[Floats, Floats]:
        """Cost of decoding on each, and the penalty where its steps get too long."""
        times, slo_ms = view.times, request.slo.itl_ms
        step_ms = times.step_ms[decodes]
        cost = times.seat_ms[decodes] + self._parameters.horizon_tokens * step_ms
        if slo_ms is None:
            return cost, np.zeros(len(decodes))
        return cost, np.where(step_ms > slo_ms, TIER, 0.0)

    def _alone(
        self, request: SchedulingRequest, view: FleetView, decodes: Rows, first: Floats, decode: Floats, penalty: Floats
    ) -> LegCosts:
        times = view.times
        stalls = np.where(self._stalls(request, view, decodes), TIER, 0.0)
        if times.confidence.max(initial=0.0) < self._parameters.min_confidence:
            stalls[:] = TIER
        return LegCosts(
            decodes,
            first[decodes] + decode + np.maximum(penalty, stalls),
            {
                "queue_ms": times.queue_ms[decodes],
                "load_ms": view.load_ms[decodes],
                "prefill_ms": times.prefill_ms[decodes],
                "seat_ms": times.seat_ms[decodes],
                "step_ms": times.step_ms[decodes],
                "stall_ms": times.stall_ms[decodes],
            },
        )

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
        self,
        request: SchedulingRequest,
        view: FleetView,
        prefills: Rows,
        decodes: Rows,
        first: Floats,
        decode: Floats,
        penalty: Floats,
    ) -> tuple[LegCosts, LegCosts, int, int, float] | None:
        """Costs of both legs, the cheapest pair's rows, and its transfer; None where no two can pair."""
        times = view.times
        can = view.can_pair(prefills, decodes)
        able = can.any(axis=1)
        if not able.any():
            return None
        rows = prefills[able]
        if len(rows) > self._parameters.max_prefills:
            nearest = np.argpartition(first[rows], self._parameters.max_prefills)[: self._parameters.max_prefills]
            rows = rows[np.sort(nearest)]
            can = view.can_pair(rows, decodes)
        else:
            can = can[able]
        transfer_ms = times.transfer_ms(rows, decodes)
        handoff_ms = np.where(can, transfer_ms + decode + penalty, np.inf)
        total = first[rows][:, None] + handoff_ms
        p, d = np.unravel_index(int(np.argmin(total)), total.shape)
        prefill_costs = LegCosts(
            rows,
            total.min(axis=1),
            {
                "queue_ms": times.queue_ms[rows],
                "load_ms": view.load_ms[rows],
                "prefill_ms": times.prefill_ms[rows],
                "cached_tokens": view.cached_tokens[rows],
            },
        )
        decode_costs = LegCosts(
            decodes,
            handoff_ms[p],
            {
                "transfer_ms": transfer_ms[p],
                "seat_ms": times.seat_ms[decodes],
                "step_ms": times.step_ms[decodes],
            },
        )
        return prefill_costs, decode_costs, int(rows[p]), int(decodes[d]), float(transfer_ms[p, d])

    def _continued(
        self, request: SchedulingRequest, view: FleetView, decodes: Rows, decode: Floats, penalty: Floats
    ) -> Decision:
        """Decode only: blocks are pulled from their holder, or the prompt and what follows is computed again."""
        times = view.times
        holder = view.ids.index(request.held_by) if request.held_by in view.ids else None
        first = times.queue_ms[decodes] + view.load_ms[decodes] + times.prefill_ms[decodes]
        terms = {"seat_ms": times.seat_ms[decodes], "step_ms": times.step_ms[decodes]}
        transfer, pulls = np.zeros(len(decodes)), np.full(len(decodes), bool(request.kv_connector))
        if holder is not None:
            from_there = np.array([holder])
            transfer = times.transfer_ms(from_there, decodes)[0]
            pulls = view.can_pair(from_there, decodes)[0]
            terms = {"transfer_ms": np.where(pulls, transfer, 0.0), "first_ms": np.where(pulls, 0.0, first), **terms}
        elif not request.kv_connector:
            terms = {"first_ms": first, **terms}
        costs = LegCosts(decodes, np.where(pulls, transfer, first) + decode + penalty, terms)
        best = int(np.argmin(costs.value))
        decision = self._decided(view, request, None, int(decodes[best]), Reason.CONTINUED, second=costs)
        if not pulls[best]:
            return decision
        # Nothing is computed: what comes before the next token is a seat and the blocks.
        wait_ms, moving_ms = float(times.seat_ms[decodes[best]]), float(transfer[best])
        foreseen = replace(decision.prediction, queue_ms=wait_ms, prefill_ms=0.0, transfer_ms=moving_ms)
        return replace(decision, prediction=foreseen)

    def _decided(
        self,
        view: FleetView,
        request: SchedulingRequest,
        prefill: int | None,
        decode: int,
        reason: Reason,
        first: LegCosts | None = None,
        second: LegCosts | None = None,
        alone: LegCosts | None = None,
        transfer_ms: float = 0.0,
    ) -> Decision:
        times, computing = view.times, decode if prefill is None else prefill
        empty = LegCosts(np.zeros(0, np.intp), np.zeros(0))
        return Decision(
            prefill=None if prefill is None else view.ids[prefill],
            decode=view.ids[decode],
            reason=reason,
            uncached_tokens=max(0, request.prompt_tokens - int(view.cached_tokens[computing])),
            policy=self.name,
            ids=view.ids,
            prefill_costs=first or empty,
            decode_costs=second or empty,
            alone_costs=alone or empty,
            prediction=Prediction(
                queue_ms=float(times.queue_ms[computing]),
                prefill_ms=float(times.prefill_ms[computing]),
                transfer_ms=transfer_ms,
                step_ms=float(times.step_ms[decode]),
                confidence=float(times.confidence[computing]),
            ),
        )
