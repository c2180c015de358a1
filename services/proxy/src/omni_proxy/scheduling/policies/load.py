"""Policies that look at load: taking turns, the least of it, the lesser of two."""

import random

import numpy as np
from pydantic import Field

from omni_proxy.scheduling.decision import Decision
from omni_proxy.scheduling.policies.legs import ByLeg, PairParameters, Ranking, tiered
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.view import FleetView, Rows


def tokens_to_compute(request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
    """Prompt tokens the worker has to compute before this request's first token, then those it could load.

    Of the tokens ahead, the expected ones do not count: they are this prompt's own prefix, and any other worker would
    compute as many for it. So a burst of one prompt follows the first of it until other work ahead outweighs that.
    """
    own = view.uncached_tokens(request)[rows]
    ahead, expected = view.ahead_tokens[rows], view.expected_tokens[rows]
    loadable, load_ms = view.loadable_tokens[rows], view.load_ms[rows]
    return Ranking(
        (own + np.maximum(ahead - expected, 0)).astype(np.float64),
        (-loadable, load_ms, view.sequences[rows], view.dispatched[rows]),
        {"own": own, "ahead": ahead, "expected": expected, "loadable": loadable, "load_ms": load_ms},
    )


def tokens_ahead(request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
    """Uncached prompt tokens in flight, wherever the prompt's prefix is."""
    ahead, sequences = view.ahead_tokens[rows], view.sequences[rows]
    return Ranking(
        ahead.astype(np.float64), (sequences, view.dispatched[rows]), {"ahead": ahead, "sequences": sequences}
    )


def sequences(request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
    """Sequences already there, then the prompt tokens it would have to compute, then the fuller cache."""
    there, uncached, kv_usage = view.sequences[rows], view.uncached_tokens(request)[rows], view.kv_usage[rows]
    return Ranking(
        there.astype(np.float64),
        (uncached, kv_usage, view.dispatched[rows]),
        {"sequences": there, "uncached": uncached, "kv_usage": kv_usage},
    )


def least_uncached_tokens(parameters: PairParameters) -> ByLeg:
    return ByLeg("least_uncached_tokens", tokens_to_compute, sequences, parameters.disaggregate_min_tokens)


def least_loaded(parameters: PairParameters) -> ByLeg:
    return ByLeg("least_loaded", tokens_ahead, sequences, parameters.disaggregate_min_tokens)


class RoundRobin:
    """Each leg goes to the worker whose name follows the last one's, so a new worker gets its turn and no more."""

    def __init__(self, parameters: PairParameters) -> None:
        self._legs = ByLeg("round_robin", self._prefills, self._decodes, parameters.disaggregate_min_tokens)
        self._prefill = ""
        self._decode = ""

    def choose(self, request: SchedulingRequest, view: FleetView) -> Decision:
        decision = self._legs.choose(request, view)
        self._prefill = decision.prefill or self._prefill
        self._decode = decision.decode
        return decision

    def _prefills(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        return _turns(view, rows, self._prefill)

    def _decodes(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        return _turns(view, rows, self._decode)


def _turns(view: FleetView, rows: Rows, last: str) -> Ranking:
    """How many turns each is away."""
    names = [view.ids[row] for row in rows]
    order = sorted(range(len(names)), key=names.__getitem__)
    passed = sum(name <= last for name in names)
    turns = np.empty(len(names))
    turns[order] = (np.arange(len(names)) - passed) % max(len(names), 1)
    return Ranking(turns)


class PowerOfTwoParameters(PairParameters):
    seed: int = Field(0, description="Of the draws; proxies of one fleet should differ")


class PowerOfTwo:
    """Of two workers drawn for each leg the less loaded one: several proxies do not all run to the same worker."""

    def __init__(self, parameters: PowerOfTwoParameters) -> None:
        self._random = random.Random(parameters.seed)
        self._legs = ByLeg("power_of_two", self._prefills, self._decodes, parameters.disaggregate_min_tokens)

    def choose(self, request: SchedulingRequest, view: FleetView) -> Decision:
        return self._legs.choose(request, view)

    def _prefills(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        return self._drawn(tokens_to_compute(request, view, rows))

    def _decodes(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        return self._drawn(sequences(request, view, rows))

    def _drawn(self, load: Ranking) -> Ranking:
        is_left_out = np.ones(len(load.value), np.int64)
        is_left_out[self._random.sample(range(len(load.value)), min(2, len(load.value)))] = 0
        return Ranking(tiered(is_left_out, load.value), load.ties, {**load.terms, "drawn": 1 - is_left_out})
