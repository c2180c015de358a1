"""The choice of workers for one request, as a value with every candidate's cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from omni_common.errors import Unavailable

RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker that takes work, as seen at the moment of the choice.

    `cached_tokens` are in its hbm or on the way there; `expected_tokens` of them are being computed for a request of
    the same prefix. `loadable_tokens` follow them and could be loaded from a slower tier or a pool in `load_ms`.
    """

    worker_id: str
    prefills: bool
    decodes: bool
    kv_connector: str = ""
    cached_tokens: int = 0
    expected_tokens: int = 0
    loadable_tokens: int = 0
    load_ms: float = 0.0
    own_requests: int = 0
    own_uncached_tokens: int = 0
    dispatched: int = 0
    running: int = 0
    queued_tokens: int = 0
    kv_usage: float = 0.0


@dataclass(frozen=True, slots=True)
class SchedulingRequest:
    """`kv_connector` is set when blocks wait under a handle: only decode workers of that kind can pull them."""

    prompt_tokens: int
    may_prefill: bool = True
    kv_connector: str | None = None
    excluded: frozenset[str] = frozenset()


class Reason(StrEnum):
    """Why a decision has the shape it has."""

    DISAGGREGATED = "disaggregated"
    SHORT = "uncached_part_short"
    NO_PREFILL = "no_prefill_worker"
    NO_CONNECTOR = "no_common_connector"
    CONTINUED = "continued"


@dataclass(frozen=True, slots=True)
class Cost:
    """A candidate's cost for one leg, lower is better, and the parts it is made of."""

    value: tuple[float, ...]
    parts: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Decision:
    """`prefill` is None when the decode worker computes the prompt itself."""

    prefill: str | None
    decode: str
    reason: Reason
    uncached_tokens: int
    prefill_costs: Mapping[str, Cost]
    decode_costs: Mapping[str, Cost]


class Policy(Protocol):
    def choose(self, request: SchedulingRequest, fleet: Sequence[Candidate]) -> Decision:
        """Raises `Unavailable` when no decode worker takes work."""


CostOf = Callable[[SchedulingRequest, Candidate], Cost]


def uncached_tokens_in_flight(request: SchedulingRequest, candidate: Candidate) -> Cost:
    """Prompt tokens the worker has to compute before this request's first token, then those it could load.

    Of the tokens ahead, the expected ones do not count: they are this prompt's own prefix, and any other worker would
    compute as many for it. So a burst of one prompt follows the first of it until other work ahead outweighs that.
    """
    own = max(0, request.prompt_tokens - candidate.cached_tokens)
    # The worker's account holds this proxy's share too, some milliseconds late: the larger one is nearer.
    ahead = max(candidate.own_uncached_tokens, candidate.queued_tokens)
    wait = own + max(0, ahead - candidate.expected_tokens)
    return Cost(
        (wait, -candidate.loadable_tokens, candidate.load_ms, candidate.own_requests, candidate.dispatched),
        {
            "own": own,
            "ahead": ahead,
            "expected": candidate.expected_tokens,
            "loadable": candidate.loadable_tokens,
            "load_ms": candidate.load_ms,
        },
    )


def running_sequences(request: SchedulingRequest, candidate: Candidate) -> Cost:
    """Sequences already there, then the prompt tokens it would have to compute, then the fuller cache."""
    running = max(candidate.own_requests, candidate.running)
    uncached = max(0, request.prompt_tokens - candidate.cached_tokens)
    value = (running, uncached, candidate.kv_usage, candidate.dispatched)
    return Cost(value, {"running": running, "uncached": uncached, "kv_usage": candidate.kv_usage})


def turns_taken(request: SchedulingRequest, candidate: Candidate) -> Cost:
    """How often this proxy has chosen the worker."""
    return Cost((candidate.dispatched,), {"dispatched": candidate.dispatched})


@dataclass(frozen=True, slots=True)
class CheapestPair:
    """The cheapest prefill worker and the cheapest decode worker it can hand its blocks to."""

    prefill_cost: CostOf
    decode_cost: CostOf
    disaggregate_min_tokens: int

    def choose(self, request: SchedulingRequest, fleet: Sequence[Candidate]) -> Decision:
        eligible = [c for c in fleet if c.worker_id not in request.excluded]
        decodes = [c for c in eligible if c.decodes]
        if not decodes:
            message = "no decode worker takes work"
            raise Unavailable(message, reason="no_decode_worker", retry_after_s=RETRY_AFTER_S)
        pairable = [c for c in decodes if request.kv_connector and c.kv_connector == request.kv_connector]
        decode_costs = {c.worker_id: self.decode_cost(request, c) for c in decodes}
        prefill_costs = {c.worker_id: self.prefill_cost(request, c) for c in eligible if c.prefills}
        decode = _cheapest(pairable or decodes, decode_costs)
        uncached = max(0, request.prompt_tokens - decode.cached_tokens)
        pair, reason = self._pair(request, eligible, decodes, uncached, prefill_costs, decode_costs)
        if pair is not None:
            return Decision(pair[0].worker_id, pair[1].worker_id, reason, uncached, prefill_costs, decode_costs)
        return Decision(None, decode.worker_id, reason, uncached, prefill_costs, decode_costs)

    def _pair(
        self,
        request: SchedulingRequest,
        eligible: Sequence[Candidate],
        decodes: Sequence[Candidate],
        uncached: int,
        prefill_costs: Mapping[str, Cost],
        decode_costs: Mapping[str, Cost],
    ) -> tuple[tuple[Candidate, Candidate] | None, Reason]:
        if not request.may_prefill:
            return None, Reason.CONTINUED
        if not prefill_costs:
            return None, Reason.NO_PREFILL
        if uncached < self.disaggregate_min_tokens:
            return None, Reason.SHORT
        connectors = {c.kv_connector for c in decodes if c.kv_connector}
        prefills = [c for c in eligible if c.prefills and c.kv_connector in connectors]
        if not prefills:
            return None, Reason.NO_CONNECTOR
        prefill = _cheapest(prefills, prefill_costs)
        decode = _cheapest([c for c in decodes if c.kv_connector == prefill.kv_connector], decode_costs)
        return (prefill, decode), Reason.DISAGGREGATED


def _cheapest(candidates: Sequence[Candidate], costs: Mapping[str, Cost]) -> Candidate:
    return min(candidates, key=lambda c: (costs[c.worker_id].value, c.worker_id))


POLICIES: Mapping[str, Callable[[int], Policy]] = {
    "least_uncached_tokens": lambda least: CheapestPair(uncached_tokens_in_flight, running_sequences, least),
    "round_robin": lambda least: CheapestPair(turns_taken, turns_taken, least),
}
"""Name -> policy for a given `disaggregate_min_tokens`."""
