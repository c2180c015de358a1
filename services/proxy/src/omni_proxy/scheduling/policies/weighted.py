"""A weighted sum of scores, as llm-d adds them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from omni_proxy.scheduling.decision import Decision
from omni_proxy.scheduling.interfaces import Observer, Scorer
from omni_proxy.scheduling.plugins import Parameters, named
from omni_proxy.scheduling.policies.legs import ByLeg, PairParameters, Ranking
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.scorers import scorers
from omni_proxy.scheduling.view import FleetView, Floats, Rows


class Weight(Parameters):
    name: str
    weight: float = Field(1.0, gt=0)
    parameters: Mapping[str, Any] = Field(default_factory=dict)


_DEFAULT = (
    Weight(name="queue", weight=2),
    Weight(name="kv_usage", weight=2),
    Weight(name="prefix", weight=3),
)


class WeightedScorersParameters(PairParameters):
    scorers: tuple[Weight, ...] = Field(_DEFAULT, min_length=1, description="Of prefill, and of decode alone")
    decode_scorers: tuple[Weight, ...] | None = Field(
        None, min_length=1, description="Of decode in a pair; null: the same"
    )


class WeightedScorers:
    """The greatest sum of weight x score; a cost is what is missing of the greatest possible one."""

    def __init__(self, parameters: WeightedScorersParameters) -> None:
        decode = parameters.scorers if parameters.decode_scorers is None else parameters.decode_scorers
        self._prefill = [(weight.name, weight.weight, _built(weight)) for weight in parameters.scorers]
        self._decode = [(weight.name, weight.weight, _built(weight)) for weight in decode]
        self._legs = ByLeg("weighted_scorers", self._prefills, self._decodes, parameters.disaggregate_min_tokens)

    def choose(self, request: SchedulingRequest, view: FleetView) -> Decision:
        decision = self._legs.choose(request, view)
        for _, _, scorer in (*self._prefill, *self._decode):
            if isinstance(scorer, Observer):
                scorer.chosen(request, view, decision)
        return decision

    def _prefills(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        return _missing(self._prefill, request, view, rows)

    def _decodes(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        return _missing(self._decode, request, view, rows)


def _built(weight: Weight) -> Scorer:
    return named("scorers", scorers(), weight.name).build(weight.name, weight.parameters)


def _missing(
    weighted: list[tuple[str, float, Scorer]], request: SchedulingRequest, view: FleetView, rows: Rows
) -> Ranking:
    candidates = np.zeros(len(view), np.bool_)
    candidates[rows] = True
    # A scorer compares candidates with each other, so it is shown those of this leg and no more.
    shown = replace(view, prefills=view.prefills & candidates, decodes=view.decodes & candidates)
    scores = {name: scorer.score(request, shown)[rows] for name, _, scorer in weighted}
    missing: Floats = np.zeros(len(rows))
    for name, weight, _ in weighted:
        missing += weight * (1.0 - scores[name])
    # What engines say of themselves may be as old as a stats interval; who was just chosen has more in the ledger.
    return Ranking(missing, (view.ahead_tokens[rows], view.sequences[rows], view.dispatched[rows]), scores)
