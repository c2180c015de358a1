"""One preference per worker, in [0, 1]. Those that compare do so among the candidates: rows that prefill or decode."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from omni_proxy.scheduling import hashing
from omni_proxy.scheduling.decision import Decision
from omni_proxy.scheduling.interfaces import Scorer
from omni_proxy.scheduling.labels import CLOSENESS, Closeness
from omni_proxy.scheduling.plugins import NoParameters, Parameters, Plugin, table
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.view import FleetView, Floats, Ints


@dataclass(frozen=True, slots=True)
class Least:
    """1 for the candidate with the least of it, 0 for the one with the most; all 1 where they are equal."""

    of: Callable[[SchedulingRequest, FleetView], Ints | Floats]

    def score(self, request: SchedulingRequest, view: FleetView) -> Floats:
        column, candidates = self.of(request, view), view.prefills | view.decodes
        if not candidates.any():
            return np.ones(len(view))
        least, most = column[candidates].min(), column[candidates].max()
        if least == most:
            return np.ones(len(view))
        score: Floats = np.clip((most - column) / (most - least), 0.0, 1.0)
        return score


class KvUsage:
    """What is free of the KV cache."""

    def score(self, request: SchedulingRequest, view: FleetView) -> Floats:
        return np.clip(1.0 - view.kv_usage, 0.0, 1.0)


class PrefixParameters(Parameters):
    length_weight: float = Field(0.0, ge=0, le=1, description="Of the hit's length, next to its share of the prompt")
    length_scale: int = Field(8192, ge=1, description="Cached tokens that count as a long hit")


@dataclass(frozen=True, slots=True)
class Prefix:
    """The cached share of the prompt, and with a weight how long it is."""

    parameters: PrefixParameters

    def score(self, request: SchedulingRequest, view: FleetView) -> Floats:
        cached = np.minimum(view.cached_tokens, request.prompt_tokens)
        share = cached / max(request.prompt_tokens, 1)
        weight = self.parameters.length_weight
        if not weight:
            return share
        return weight * np.minimum(cached / self.parameters.length_scale, 1.0) ** 2 + (1.0 - weight) * share


class TokenLoadParameters(Parameters):
    most_tokens: int = Field(4_194_304, ge=1, description="Uncached prompt tokens at which the score is 0")


@dataclass(frozen=True, slots=True)
class TokenLoad:
    """Uncached prompt tokens in flight and this request's own, against a fixed most."""

    parameters: TokenLoadParameters

    def score(self, request: SchedulingRequest, view: FleetView) -> Floats:
        tokens = view.ahead_tokens + view.uncached_tokens(request)
        return 1.0 - np.minimum(tokens / self.parameters.most_tokens, 1.0)


class ActiveRequestsParameters(Parameters):
    idle: int = Field(0, ge=0, description="Requests in flight up to which a worker counts as idle")
    most_busy_score: float = Field(1.0, ge=0, le=1, description="Score of the least busy worker that is not idle")


@dataclass(frozen=True, slots=True)
class ActiveRequests:
    """This proxy's own requests in flight: 1 for idle workers, then in proportion to the busiest."""

    parameters: ActiveRequestsParameters

    def score(self, request: SchedulingRequest, view: FleetView) -> Floats:
        active, candidates = view.own_requests, view.prefills | view.decodes
        most = active[candidates].max(initial=0)
        share = np.clip((most - active) / max(most, 1), 0.0, 1.0)
        return np.where(active <= self.parameters.idle, 1.0, self.parameters.most_busy_score * share)


class Session:
    """1 for the candidate that rendezvous hashing gives the session to; without a session all are alike."""

    def score(self, request: SchedulingRequest, view: FleetView) -> Floats:
        score = np.zeros(len(view))
        rows = np.flatnonzero(view.prefills | view.decodes)
        if not request.session or not len(rows):
            return score
        score[rows[np.argmax(hashing.weights(request.session, [view.ids[row] for row in rows]))]] = 1.0
        return score


class TopologyParameters(Parameters):
    closeness: dict[str, float] = Field(
        default_factory=lambda: dict(CLOSENESS), description="Label -> closeness of workers that share its value"
    )


class Topology:
    """How close the worker is to the one that holds the blocks; all 1 where none does."""

    def __init__(self, parameters: TopologyParameters) -> None:
        self._closeness = Closeness(parameters.closeness)

    def score(self, request: SchedulingRequest, view: FleetView) -> Floats:
        return self._closeness.to(view, request.held_by) if request.held_by else np.ones(len(view))


class Lora:
    """1 where the request's adapter is in a slot; for the model itself all are alike."""

    def score(self, request: SchedulingRequest, view: FleetView) -> Floats:
        return view.has_adapter.astype(np.float64)


class NoHitLruParameters(Parameters):
    workers: int = Field(1024, ge=1, description="Workers remembered")


class NoHitLru:
    """Spreads prompts that nobody has cached: the longer ago a worker was given one, the better.

    A prompt that is cached somewhere scores 0.5 everywhere, so that other scorers decide.
    """

    def __init__(self, parameters: NoHitLruParameters) -> None:
        self._most = parameters.workers
        self._last: OrderedDict[str, None] = OrderedDict()

    def score(self, request: SchedulingRequest, view: FleetView) -> Floats:
        if _is_warm(view):
            return np.full(len(view), 0.5)
        places = {worker: place for place, worker in enumerate(self._last, 1)}
        return np.array([1.0 - places.get(worker, 0) / (len(places) + 1) for worker in view.ids], np.float64)

    def chosen(self, request: SchedulingRequest, view: FleetView, decision: Decision) -> None:
        if _is_warm(view) or not request.may_prefill:
            return
        worker = decision.prefill or decision.decode
        self._last[worker] = None
        self._last.move_to_end(worker)
        if len(self._last) > self._most:
            self._last.popitem(last=False)


def _is_warm(view: FleetView) -> bool:
    return bool(view.cached_tokens[view.prefills | view.decodes].any())


def _of(column: Callable[[SchedulingRequest, FleetView], Ints | Floats]) -> Plugin[Scorer]:
    return Plugin(NoParameters, lambda _: Least(column))


SCORERS: Mapping[str, Plugin[Scorer]] = {
    "queue": _of(lambda _, view: view.waiting),
    "running": _of(lambda _, view: view.running),
    "kv_usage": Plugin(NoParameters, lambda _: KvUsage()),
    "prefix": Plugin(PrefixParameters, Prefix),
    "token_load": Plugin(TokenLoadParameters, TokenLoad),
    "active_requests": Plugin(ActiveRequestsParameters, ActiveRequests),
    "predicted_ttft": _of(lambda _, view: view.times.queue_ms + view.load_ms + view.adapter_ms + view.times.prefill_ms),
    "predicted_itl": _of(lambda _, view: view.times.step_ms),
    "session": Plugin(NoParameters, lambda _: Session()),
    "topology": Plugin(TopologyParameters, Topology),
    "lora": Plugin(NoParameters, lambda _: Lora()),
    "no_hit_lru": Plugin(NoHitLruParameters, NoHitLru),
}


def scorers() -> Mapping[str, Plugin[Scorer]]:
    """The shipped ones and those of installed distributions."""
    return table("scorers", SCORERS)
