"""Policies that follow the cached prefix, and how far."""

from dataclasses import dataclass

import numpy as np
from pydantic import Field

from omni_proxy.scheduling.policies.legs import ByLeg, PairParameters, Ranking, tiered
from omni_proxy.scheduling.policies.load import sequences, tokens_ahead, tokens_to_compute
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.view import Bools, FleetView, Floats, Ints, Rows


class PrefixAffinityParameters(PairParameters):
    affinity_threshold: float = Field(0.8, ge=0, le=1, description="Cached share of the prompt that counts as a hit")


def prefix_affinity(parameters: PrefixAffinityParameters) -> ByLeg:
    longest = LongestPrefix(parameters.affinity_threshold)
    return ByLeg("prefix_affinity", longest.prefill, longest.decode, parameters.disaggregate_min_tokens)


@dataclass(frozen=True, slots=True)
class LongestPrefix:
    """The longest cached prefix if it is a hit anywhere, and the least loaded worker otherwise; load breaks ties."""

    affinity_threshold: float

    def prefill(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        return self._by_miss(request, view, rows, tokens_ahead(request, view, rows))

    def decode(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        return self._by_miss(request, view, rows, sequences(request, view, rows))

    def _by_miss(self, request: SchedulingRequest, view: FleetView, rows: Rows, load: Ranking) -> Ranking:
        hit = np.where(is_hit(request, view, rows, self.affinity_threshold), view.cached_tokens[rows], 0)
        hit = np.minimum(hit, request.prompt_tokens)
        missed = (request.prompt_tokens - hit).astype(np.float64)
        return Ranking(missed, (load.value, *load.ties), {"hit": hit, **load.terms})


class StickyParameters(PairParameters):
    affinity_threshold: float = Field(0.8, ge=0, le=1, description="Cached share of the prompt that makes sticky")
    max_penalty_ms: float = Field(
        18_000.0, ge=0, description="Extra wait at which the prefix is given up; 0: never give it up"
    )
    prefill_tokens_per_s: float | None = Field(
        None, gt=0, description="Peak prefill rate that turns tokens ahead into a wait; null: the predicted wait"
    )


def sticky_until_saturated(parameters: StickyParameters) -> ByLeg:
    sticky = StickyUntilSaturated(parameters)
    return ByLeg("sticky_until_saturated", sticky.prefill, sequences, parameters.disaggregate_min_tokens)


@dataclass(frozen=True, slots=True)
class StickyUntilSaturated:
    """Among workers that hold the prompt's prefix, until the least wait there exceeds the least elsewhere by too much.

    Among those that remain: the fewest prompt tokens to compute, ahead and own.
    """

    parameters: StickyParameters

    def prefill(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        load = tokens_to_compute(request, view, rows)
        sticky = is_hit(request, view, rows, self.parameters.affinity_threshold)
        wait_ms = self._wait_ms(view, rows)
        if self._is_saturated(sticky, wait_ms):
            sticky = np.zeros(len(rows), np.bool_)
        terms: dict[str, Floats | Ints] = {"sticky": sticky.astype(np.int64), "wait_ms": wait_ms, **load.terms}
        return Ranking(tiered(~sticky, load.value), load.ties, terms)

    def _is_saturated(self, sticky: Bools, wait_ms: Floats) -> bool:
        most = self.parameters.max_penalty_ms
        if not most or not sticky.any() or sticky.all():
            return False
        return bool(wait_ms[sticky].min() - wait_ms[~sticky].min() > most)

    def _wait_ms(self, view: FleetView, rows: Rows) -> Floats:
        rate = self.parameters.prefill_tokens_per_s
        if rate is None:
            return view.times.queue_ms[rows]
        return view.ahead_tokens[rows].astype(np.float64) * (1000.0 / rate)


def is_hit(request: SchedulingRequest, view: FleetView, rows: Rows, threshold: float) -> Bools:
    """Where so much of the prompt is cached; nowhere if nothing is."""
    cached = view.cached_tokens[rows]
    return (cached > 0) & (cached >= threshold * request.prompt_tokens)
