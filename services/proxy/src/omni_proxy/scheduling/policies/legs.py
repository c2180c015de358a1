"""Policies that rank each leg by itself: a rule for prefill, a rule for decode, and the best pair they make."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from pydantic import Field

from omni_proxy.scheduling.decision import NO_COSTS, TIER, Decision, LegCosts, Prediction, Reason, eligible, foreseen
from omni_proxy.scheduling.plugins import Parameters
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.view import Bools, FleetView, Floats, Ints, Rows

Column = Floats | Ints


class PairParameters(Parameters):
    """What every policy takes that does not weigh a pair against decode alone by predictions."""

    disaggregate_min_tokens: int | None = Field(
        0, ge=0, description="Uncached prompt tokens on the decode worker from which prefill is apart; null: never"
    )


@dataclass(frozen=True, slots=True)
class Ranking:
    """Candidates of one leg: least `value` first, of equal ones least of each of `ties` in turn, then the name."""

    value: Floats
    ties: tuple[Column, ...] = ()
    terms: Mapping[str, Column] = field(default_factory=dict)


class LegRule(Protocol):
    def __call__(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        """Ranks `rows` of the view. For decode, `request.held_by` is the worker whose blocks it will pull, if any."""


def tiered(tier: Column | Bools, cost: Column) -> Floats:
    """Every cost of a lower tier before any of a higher one; tier 0 is the best."""
    return np.minimum(cost, TIER - 1).astype(np.float64) + TIER * tier


def first(view: FleetView, rows: Rows, ranking: Ranking, among: Bools | None = None) -> int:
    """The best of `rows`, or of those of them that `among` marks."""
    left = np.arange(len(rows)) if among is None else np.flatnonzero(among)
    for column in (ranking.value, *ranking.ties):
        part = column[left]
        left = left[part == part.min()]
        if len(left) == 1:
            break
    return int(min((rows[i] for i in left), key=lambda row: view.ids[row]))


def costs_of(rows: Rows, ranking: Ranking) -> LegCosts:
    return LegCosts(rows, np.asarray(ranking.value, np.float64), ranking.terms)


@dataclass(frozen=True, slots=True)
class ByLeg:
    """The best prefill worker and the best decode worker it can hand its blocks to.

    Decode alone where the best decode worker would compute less than `disaggregate_min_tokens`. Where nothing pairs,
    or nothing should, the worker that decodes also computes the prompt and is ranked as prefill workers are.
    """

    name: str
    prefill: LegRule
    decode: LegRule
    disaggregate_min_tokens: int | None = 0

    def choose(self, request: SchedulingRequest, view: FleetView) -> Decision:
        prefills, decodes = eligible(request, view)
        seats = self.decode(request, view, decodes)
        decode = first(view, decodes, seats, _pulling(request, view, decodes))
        reason = self._alone(request, view, prefills, decode)
        prefill, prefill_costs, alone_costs = None, NO_COSTS, NO_COSTS
        if len(prefills):
            prompts = self.prefill(request, view, prefills)
            prefill_costs = costs_of(prefills, prompts)
            if reason is None:
                prefill = _pairable(view, prefills, prompts, decodes)
        if prefill is not None:
            handed = replace(request, held_by=view.ids[prefill], kv_connector=view.connectors[prefill])
            seats = self.decode(handed, view, decodes)
            decode = first(view, decodes, seats, _pulling(handed, view, decodes))
        elif self._computes(request, reason):
            prompts = self.prefill(request, view, decodes)
            decode = first(view, decodes, replace(prompts, ties=(*prompts.ties, seats.value, *seats.ties)))
            alone_costs = costs_of(decodes, prompts)
        computing = decode if prefill is None else prefill
        return Decision(
            prefill=None if prefill is None else view.ids[prefill],
            decode=view.ids[decode],
            reason=reason or (Reason.NO_CONNECTOR if prefill is None else Reason.DISAGGREGATED),
            uncached_tokens=int(max(request.prompt_tokens - view.cached_tokens[computing], 0)),
            policy=self.name,
            ids=view.ids,
            prefill_costs=prefill_costs,
            decode_costs=costs_of(decodes, seats),
            alone_costs=alone_costs,
            prediction=_prediction(request, view, prefill, decode),
        )

    def _alone(self, request: SchedulingRequest, view: FleetView, prefills: Rows, decode: int) -> Reason | None:
        """Why decode goes alone whatever could pair; None where it need not."""
        if not request.may_prefill:
            return Reason.CONTINUED
        if not len(prefills):
            return Reason.NO_PREFILL
        least = self.disaggregate_min_tokens
        if least is None or max(request.prompt_tokens - view.cached_tokens[decode], 0) < least:
            return Reason.SHORT
        return None

    def _computes(self, request: SchedulingRequest, reason: Reason | None) -> bool:
        """Whether decode has enough of the prompt to compute that it is chosen by that."""
        is_short = reason is Reason.SHORT and self.disaggregate_min_tokens is not None
        return not request.kv_connector and not is_short


def _pulling(request: SchedulingRequest, view: FleetView, decodes: Rows) -> Bools | None:
    """Which of them can pull the blocks that wait; None: nothing waits, or it is not known or nobody can."""
    if not request.kv_connector or request.held_by not in view.ids:
        return None
    holder = view.ids.index(request.held_by)
    can = view.can_pair(np.array([holder]), decodes).ravel()
    return can if can.any() else None


def _pairable(view: FleetView, prefills: Rows, ranking: Ranking, decodes: Rows) -> int | None:
    """The best prefill worker that can hand over to any of `decodes`."""
    best = first(view, prefills, ranking)
    if view.can_pair(np.array([best]), decodes).any():
        return best
    pairing: Bools = np.asarray(view.can_pair(prefills, decodes).any(axis=1))
    return first(view, prefills, ranking, pairing) if pairing.any() else None


def _prediction(request: SchedulingRequest, view: FleetView, prefill: int | None, decode: int) -> Prediction:
    """What the predictors say of the choice, though it was not made by them."""
    pulls = _pulling(request, view, np.array([decode]))
    is_pull = pulls is not None and bool(pulls[0])
    holder = view.ids.index(request.held_by or "") if is_pull else prefill
    transfer_ms = 0.0
    if holder is not None:
        transfer_ms = float(view.times.transfer_ms(np.array([holder]), np.array([decode]))[0, 0])
    return foreseen(view, prefill, decode, transfer_ms=transfer_ms, pulls=is_pull)
