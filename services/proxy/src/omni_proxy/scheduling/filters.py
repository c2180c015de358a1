"""Who may stay. A filter answers for every row; what happens where nobody would be left is up to its use.

What is unknown never removes a worker: no cap of its own, no label, no sign of how large its cache is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from omni_proxy.scheduling.interfaces import Filter
from omni_proxy.scheduling.labels import CLOSENESS, Closeness, Labels, LengthRanges, PerFleet
from omni_proxy.scheduling.plugins import NoParameters, Parameters, Plugin, table
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.view import Bools, FleetView


class Requirement(Parameters):
    """As Kubernetes' matchExpressions; Gt and Lt compare whole numbers."""

    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    values: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _has_its_values(self) -> "Requirement":
        if self.operator in {"Exists", "DoesNotExist"} and self.values:
            raise ValueError(f"{self.operator} takes no values")
        if self.operator in {"In", "NotIn"} and not self.values:
            raise ValueError(f"{self.operator} needs values")
        if self.operator in {"Gt", "Lt"} and (len(self.values) != 1 or not _is_whole(self.values[0])):
            raise ValueError(f"{self.operator} needs one whole number")
        return self

    def holds(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        match self.operator:
            case "In":
                return value in self.values
            case "NotIn":
                return value not in self.values
            case "Exists":
                return value is not None
            case "DoesNotExist":
                return value is None
            case "Gt":
                return value is not None and _is_whole(value) and int(value) > int(self.values[0])
            case "Lt":
                return value is not None and _is_whole(value) and int(value) < int(self.values[0])


class SelectorParameters(Parameters):
    match_labels: Mapping[str, str] = Field(default_factory=dict)
    match_expressions: tuple[Requirement, ...] = ()


class Selector:
    """Workers whose labels meet all requirements."""

    def __init__(self, parameters: SelectorParameters) -> None:
        self._parameters = parameters
        self._kept = PerFleet(self._read)

    def keep(self, request: SchedulingRequest, view: FleetView) -> Bools:
        return self._kept.of(view)

    def _read(self, labels: Labels) -> Bools:
        wanted, expressions = self._parameters.match_labels.items(), self._parameters.match_expressions
        kept = np.array([wanted <= own.items() and all(e.holds(own) for e in expressions) for own in labels], np.bool_)
        kept.flags.writeable = False
        return kept


class RoleParameters(Parameters):
    role: Literal["prefill", "decode", "both"]


@dataclass(frozen=True, slots=True)
class Role:
    """Workers of exactly that role: for example decode workers that are not also lent to prefill."""

    parameters: RoleParameters

    def keep(self, request: SchedulingRequest, view: FleetView) -> Bools:
        match self.parameters.role:
            case "prefill":
                return view.prefills & ~view.decodes
            case "decode":
                return view.decodes & ~view.prefills
            case "both":
                return view.prefills & view.decodes


class TopologyParameters(Parameters):
    least: float = Field(0.05, ge=0, le=1, description="Closeness to the worker that holds the blocks")
    closeness: dict[str, float] = Field(
        default_factory=lambda: dict(CLOSENESS), description="Label -> closeness of workers that share its value"
    )


class Topology:
    """Workers near the one that holds the request's blocks; all where none does."""

    def __init__(self, parameters: TopologyParameters) -> None:
        self._least = parameters.least
        self._closeness = Closeness(parameters.closeness)

    def keep(self, request: SchedulingRequest, view: FleetView) -> Bools:
        if not request.held_by:
            return np.ones(len(view), np.bool_)
        return self._closeness.to(view, request.held_by) >= self._least


class UtilizationParameters(Parameters):
    """Each cap is the most that passes; null: no cap."""

    max_active: int | None = Field(None, ge=0, description="This proxy's requests in flight")
    max_running: int | None = Field(None, ge=0, description="Sequences in the engine's batch")
    max_waiting: int | None = Field(None, ge=0, description="Sequences in the engine's queue")
    max_kv_usage: float | None = Field(None, ge=0, le=1)
    max_uncached_tokens: int | None = Field(None, ge=0, description="Prompt tokens in flight that are to be computed")
    max_stats_age_s: float | None = Field(None, ge=0, description="Age of what the worker last said of itself")


@dataclass(frozen=True, slots=True)
class Utilization:
    """Workers under all caps."""

    parameters: UtilizationParameters

    def keep(self, request: SchedulingRequest, view: FleetView) -> Bools:
        caps = self.parameters
        kept = np.ones(len(view), np.bool_)
        for column, most in (
            (view.own_requests, caps.max_active),
            (view.running, caps.max_running),
            (view.waiting, caps.max_waiting),
            (view.kv_usage, caps.max_kv_usage),
            (view.ahead_tokens, caps.max_uncached_tokens),
            (view.stats_age_s, caps.max_stats_age_s),
        ):
            if most is not None:
                kept &= column <= most
        return kept


class PrefixAffinityParameters(Parameters):
    threshold: float = Field(0.8, ge=0, le=1, description="Cached share of the prompt")
    max_penalty_ms: float = Field(18_000.0, ge=0, description="Extra predicted wait that breaks it; 0: never")


@dataclass(frozen=True, slots=True)
class PrefixAffinity:
    """Workers that hold the prompt's prefix, unless the least predicted wait there passes the least elsewhere too far.

    Keeps all where none holds it.
    """

    parameters: PrefixAffinityParameters

    def keep(self, request: SchedulingRequest, view: FleetView) -> Bools:
        candidates = view.prefills | view.decodes
        holding = (view.cached_tokens > 0) & (view.cached_tokens >= self.parameters.threshold * request.prompt_tokens)
        near, far = holding & candidates, ~holding & candidates
        if not near.any():
            return np.ones(len(view), np.bool_)
        if self.parameters.max_penalty_ms and far.any():
            wait_ms = view.times.queue_ms
            if wait_ms[near].min() - wait_ms[far].min() > self.parameters.max_penalty_ms:
                return np.ones(len(view), np.bool_)
        return holding


class SloHeadroomParameters(Parameters):
    margin: float = Field(0.0, ge=0, lt=1, description="Share of the service level that is to stay free")


@dataclass(frozen=True, slots=True)
class SloHeadroom:
    """Workers predicted to meet the request's service levels: TTFT those that compute prompts, ITL those that decode.

    What the request has waited already counts. Without a service level all stay.
    """

    parameters: SloHeadroomParameters

    def keep(self, request: SchedulingRequest, view: FleetView) -> Bools:
        share, times = 1.0 - self.parameters.margin, view.times
        kept = np.ones(len(view), np.bool_)
        if request.slo.ttft_ms is not None and request.may_prefill:
            ttft_ms = request.waited_ms + times.queue_ms + view.load_ms + view.adapter_ms + times.prefill_ms
            kept &= (ttft_ms <= share * request.slo.ttft_ms) | ~view.prefills
        if request.slo.itl_ms is not None:
            kept &= (times.step_ms <= share * request.slo.itl_ms) | ~view.decodes
        return kept


class Lora:
    """Workers that have the request's adapter in a slot; all for the model itself."""

    def keep(self, request: SchedulingRequest, view: FleetView) -> Bools:
        return view.has_adapter


class LengthRangeParameters(Parameters):
    bounds: tuple[int, ...] = Field(
        (), description="Prompt tokens that separate the buckets unlabelled workers are shared out to; none: any length"
    )


class LengthRange:
    """Workers for prompts of that length."""

    def __init__(self, parameters: LengthRangeParameters) -> None:
        self._ranges = LengthRanges(parameters.bounds)

    def keep(self, request: SchedulingRequest, view: FleetView) -> Bools:
        return self._ranges.contain(view, request.prompt_tokens)


class KvRoomParameters(Parameters):
    max_usage: float = Field(0.95, gt=0, le=1, description="Of the KV cache, with this request in it")
    output_share: float = Field(1.0, ge=0, le=1, description="Of the expected output that has to fit as well")


@dataclass(frozen=True, slots=True)
class KvRoom:
    """Workers whose KV cache has room for the sequence.

    How large a cache is follows from the tokens in it and the share they fill, so a worker that is all but empty stays.
    """

    parameters: KvRoomParameters

    def keep(self, request: SchedulingRequest, view: FleetView) -> Bools:
        needed = view.uncached_tokens(request) + self.parameters.output_share * request.output_tokens
        # needed / capacity <= max_usage - usage, where capacity = context_tokens / usage
        fits = needed * view.kv_usage <= (self.parameters.max_usage - view.kv_usage) * view.context_tokens
        kept: Bools = fits | (view.kv_usage < _ALL_BUT_EMPTY) | (view.context_tokens == 0)
        return kept


_ALL_BUT_EMPTY = 0.02


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


FILTERS: Mapping[str, Plugin[Filter]] = {
    "selector": Plugin(SelectorParameters, Selector),
    "role": Plugin(RoleParameters, Role),
    "topology": Plugin(TopologyParameters, Topology),
    "utilization": Plugin(UtilizationParameters, Utilization),
    "prefix_affinity": Plugin(PrefixAffinityParameters, PrefixAffinity),
    "slo_headroom": Plugin(SloHeadroomParameters, SloHeadroom),
    "lora": Plugin(NoParameters, lambda _: Lora()),
    "length_range": Plugin(LengthRangeParameters, LengthRange),
    "kv_room": Plugin(KvRoomParameters, KvRoom),
}


def filters() -> Mapping[str, Plugin[Filter]]:
    """The shipped ones and those of installed distributions."""
    return table("filters", FILTERS)
