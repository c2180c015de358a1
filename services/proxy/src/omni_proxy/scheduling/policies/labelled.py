"""Policies that follow what workers are as far as load allows: one of another kind counts as so much more loaded."""

import numpy as np
from pydantic import Field

from omni_proxy.scheduling.labels import CLOSENESS, Closeness, LengthRanges
from omni_proxy.scheduling.policies.legs import ByLeg, PairParameters, Ranking
from omni_proxy.scheduling.policies.load import sequences, tokens_to_compute
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.view import FleetView, Floats, Rows


class TopologyParameters(PairParameters):
    closeness: dict[str, float] = Field(
        default_factory=lambda: dict(CLOSENESS), description="Label -> closeness of workers that share its value"
    )
    far_sequences: float = Field(8.0, ge=0, description="Sequences that decode in no common place counts as")


def topology(parameters: TopologyParameters) -> ByLeg:
    near = NearPrefill(parameters)
    return ByLeg("topology", tokens_to_compute, near, parameters.disaggregate_min_tokens)


class NearPrefill:
    """Decode near the worker its blocks come from: the same host before the same rack, zone, region."""

    def __init__(self, parameters: TopologyParameters) -> None:
        self._far_sequences = parameters.far_sequences
        self._closeness = Closeness(parameters.closeness)

    def __call__(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        load = sequences(request, view, rows)
        closeness = np.ones(len(rows))
        if request.held_by:
            closeness = self._closeness.to(view, request.held_by)[rows]
        return _penalised(load, self._far_sequences * (1.0 - closeness), closeness=closeness)


class LoraParameters(PairParameters):
    miss_sequences: float = Field(4.0, ge=0, description="Sequences that bringing the adapter into a slot counts as")
    miss_tokens: float = Field(
        4096.0, ge=0, description="Prompt tokens that bringing the adapter into a slot counts as"
    )


def lora_affinity(parameters: LoraParameters) -> ByLeg:
    loaded = AdapterLoaded(parameters)
    return ByLeg("lora_affinity", loaded.prefill, loaded.decode, parameters.disaggregate_min_tokens)


class AdapterLoaded:
    """Workers that have the request's adapter in a slot; for the model itself, load alone."""

    def __init__(self, parameters: LoraParameters) -> None:
        self._parameters = parameters

    def prefill(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        missing = _without_adapter(view, rows)
        load = tokens_to_compute(request, view, rows)
        return _penalised(load, self._parameters.miss_tokens * missing, loaded=1.0 - missing)

    def decode(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        missing = _without_adapter(view, rows)
        load = sequences(request, view, rows)
        return _penalised(load, self._parameters.miss_sequences * missing, loaded=1.0 - missing)


class LengthBucketParameters(PairParameters):
    bounds: tuple[int, ...] = Field(
        (), description="Prompt tokens that separate the buckets unlabelled workers are shared out to; none: any length"
    )
    misfit_tokens: float = Field(65_536.0, ge=0, description="Prompt tokens that a worker of other lengths counts as")
    misfit_sequences: float = Field(64.0, ge=0, description="Sequences that a worker of other lengths counts as")


def length_bucket(parameters: LengthBucketParameters) -> ByLeg:
    fitting = FittingLength(parameters)
    return ByLeg("length_bucket", fitting.prefill, fitting.decode, parameters.disaggregate_min_tokens)


class FittingLength:
    """Workers for prompts of that length, so that short ones do not wait behind long ones."""

    def __init__(self, parameters: LengthBucketParameters) -> None:
        self._parameters = parameters
        self._ranges = LengthRanges(parameters.bounds)

    def prefill(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        misfit = self._misfit(request, view, rows)
        load = tokens_to_compute(request, view, rows)
        return _penalised(load, self._parameters.misfit_tokens * misfit, fits=1.0 - misfit)

    def decode(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        misfit = self._misfit(request, view, rows)
        load = sequences(request, view, rows)
        return _penalised(load, self._parameters.misfit_sequences * misfit, fits=1.0 - misfit)

    def _misfit(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Floats:
        fits = self._ranges.contain(view, request.prompt_tokens)
        return (~fits[rows]).astype(np.float64)


def _without_adapter(view: FleetView, rows: Rows) -> Floats:
    return (~view.has_adapter[rows]).astype(np.float64)


def _penalised(load: Ranking, penalty: Floats, **term: Floats) -> Ranking:
    return Ranking(load.value + penalty, (penalty, *load.ties), {**load.terms, **term})
