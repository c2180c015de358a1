"""Policies that look at load: taking turns, the least of it, the lesser of two."""

import random

import numpy as np
from pydantic import Field

from omni_proxy.scheduling.decision import Decision
from omni_proxy.scheduling.policies.legs import ByLeg, PairParameters, Ranking, tiered
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.view import FleetView, Ints, Rows


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
    """Each leg to the worker that had the fewest turns, by the ledger: what was chosen and not sent takes no turn.

    Whoever joins or returns starts level with the one of its role that had the fewest, so it is not flooded.
    """

    def __init__(self, parameters: PairParameters) -> None:
        self._legs = ByLeg("round_robin", self._turns, self._turns, parameters.disaggregate_min_tokens)
        self._ids: tuple[str, ...] = ()
        self._before: Ints = np.zeros(0, np.int64)
        """Legs sent to each worker that are not counted as turns."""

    def choose(self, request: SchedulingRequest, view: FleetView) -> Decision:
        if view.ids != self._ids:
            self._meet(view)
        return self._legs.choose(request, view)

    def _turns(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        turns = view.dispatched[rows] - self._before[rows]
        return Ranking(turns.astype(np.float64), terms={"turns": turns})

    def _meet(self, view: FleetView) -> None:
        known = dict(zip(self._ids, self._before.tolist(), strict=True))
        role = 2 * view.prefills + view.decodes
        is_known = np.array([worker in known for worker in view.ids], np.bool_)
        turns = np.maximum(view.dispatched - np.array([known.get(worker, 0) for worker in view.ids], np.int64), 0)
        for kind in np.unique(role):
            peers, others = (role == kind) & is_known, (role == kind) & ~is_known
            turns[others] = turns[peers].min() if peers.any() else 0
        self._ids, self._before = view.ids, view.dispatched - turns


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
