"""The outcome of a choice, as a value: who, why, and what every candidate would have cost."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from omni_common.errors import Unavailable
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.view import FleetView, Floats, Rows

RETRY_AFTER_S = 1.0
TIER = 1e9
"""More than any cost within a tier: every candidate of a lower tier goes before any of a higher one."""


class Reason(StrEnum):
    """Why a decision has the shape it has."""

    DISAGGREGATED = "disaggregated"
    SHORT = "uncached_part_short"
    CHEAPER_ALONE = "cheaper_alone"
    NO_PREFILL = "no_prefill_worker"
    NO_CONNECTOR = "no_common_connector"
    CONTINUED = "continued"


@dataclass(frozen=True, slots=True)
class LegCosts:
    """Candidates of one leg: `value[i]` is the cost of worker `ids[rows[i]]`, lower is better.

    `terms` are what it is made of, each an array like `value`; names carry units.
    """

    rows: Rows
    value: Floats
    terms: Mapping[str, Any] = field(default_factory=dict)


NO_COSTS = LegCosts(np.zeros(0, np.intp), np.zeros(0))


class Taken(Mapping[str, Any]):
    """Terms of a leg as columns of a whole view; the entries of its candidates are taken when somebody reads them."""

    __slots__ = ("_columns", "_rows")

    def __init__(self, rows: Rows, columns: Mapping[str, Any]) -> None:
        self._rows = rows
        self._columns = columns

    def __getitem__(self, name: str) -> Any:
        return self._columns[name][self._rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the chosen legs are expected to take, in milliseconds; 0 where a policy does not predict."""

    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    transfer_ms: float = 0.0
    step_ms: float = 0.0
    confidence: float = 0.0
    adapter_ms: float = 0.0
    seat_ms: float = 0.0
    """Until decode has a seat for the sequence, from now on."""
    is_alone: bool = False
    """Decode computes the prompt, which has to have a seat there first."""
    decode_draws_first: bool = False
    """The token of the prefill leg may not stand, so the client's first one comes after the handoff."""

    @property
    def computed_ms(self) -> float:
        """From dispatch to the end of the prompt."""
        begins_ms = max(self.queue_ms, self.seat_ms) if self.is_alone else self.queue_ms
        return begins_ms + self.adapter_ms + self.prefill_ms

    @property
    def ttft_ms(self) -> float:
        """From dispatch to the client's first token."""
        if not self.decode_draws_first:
            return self.computed_ms
        return max(self.computed_ms + self.transfer_ms, self.seat_ms) + self.step_ms


NO_PREDICTION = Prediction()


def foreseen(
    view: FleetView, prefill: int | None, decode: int, *, transfer_ms: float = 0.0, pulls: bool = False
) -> Prediction:
    """Of the rows chosen. Where decode `pulls` blocks that wait, nothing is computed before the next token."""
    times, computing = view.times, decode if prefill is None else prefill
    return Prediction(
        queue_ms=float(times.seat_ms[decode] if pulls else times.queue_ms[computing]),
        prefill_ms=0.0 if pulls else float(times.prefill_ms[computing]),
        transfer_ms=transfer_ms,
        step_ms=float(times.step_ms[decode]),
        confidence=float(times.confidence[computing]),
        adapter_ms=float(view.adapter_ms[computing]),
        seat_ms=0.0 if pulls else float(times.seat_ms[decode]),
        is_alone=prefill is None and not pulls,
    )


@dataclass(frozen=True, slots=True)
class Decision:
    """`prefill` is None when the decode worker computes the prompt itself."""

    prefill: str | None
    decode: str
    reason: Reason
    uncached_tokens: int
    """Of the prompt, on the worker that computes it."""
    policy: str
    ids: tuple[str, ...]
    prefill_costs: LegCosts = NO_COSTS
    decode_costs: LegCosts = NO_COSTS
    """Of decode as the second leg of a pair, or of going on there."""
    alone_costs: LegCosts = NO_COSTS
    """Of decode that computes the prompt itself, in the unit of `prefill_costs`."""
    prediction: Prediction = NO_PREDICTION
    adapter: str = ""
    """Of the request; empty: the model itself."""

    def explained(self, limit: int | None = None) -> dict[str, Any]:
        """For people: the choice and its candidates, cheapest first, at most `limit` of each leg."""
        legs = {"prefill": self.prefill_costs, "decode": self.decode_costs, "alone": self.alone_costs}
        of_adapter = {"adapter_ms": round(self.prediction.adapter_ms, 3)} if self.adapter else {}
        return {
            "policy": self.policy,
            **({"adapter": self.adapter} if self.adapter else {}),
            "prefill": self.prefill,
            "decode": self.decode,
            "reason": str(self.reason),
            "uncached_tokens": self.uncached_tokens,
            "predicted": {
                "ttft_ms": round(self.prediction.ttft_ms, 3),
                "queue_ms": round(self.prediction.queue_ms, 3),
                "prefill_ms": round(self.prediction.prefill_ms, 3),
                "transfer_ms": round(self.prediction.transfer_ms, 3),
                "seat_ms": round(self.prediction.seat_ms, 3),
                "step_ms": round(self.prediction.step_ms, 3),
                "confidence": round(self.prediction.confidence, 3),
                **of_adapter,
            },
            "candidates": {name: _ranked(self.ids, costs, limit) for name, costs in legs.items() if len(costs.rows)},
        }


def _ranked(ids: Sequence[str], costs: LegCosts, limit: int | None) -> list[dict[str, Any]]:
    order = np.argsort(costs.value, kind="stable")[:limit]
    return [
        {
            "worker": ids[costs.rows[i]],
            **_told(float(costs.value[i])),
            **{name: round(float(column[i]), 3) for name, column in costs.terms.items()},
        }
        for i in order
    ]


def _told(cost: float) -> dict[str, Any]:
    """The cost within its tier, and the tier where it is not the best; null: not possible."""
    if not np.isfinite(cost):
        return {"cost": None}
    tier, within = divmod(cost, TIER)
    return {"cost": round(within, 3)} | ({"tier": int(tier)} if tier > 0 else {})


def nobody_takes(adapter: str, retry_after_s: float) -> Unavailable:
    """No decode worker takes work; for an adapter, none of those that serve it."""
    if not adapter:
        return Unavailable("no decode worker takes work", reason="no_decode_worker", retry_after_s=retry_after_s)
    message = f"no decode worker that serves the adapter {adapter!r} takes work"
    return Unavailable(message, reason="no_adapter", retry_after_s=retry_after_s)


def eligible(request: SchedulingRequest, view: FleetView) -> tuple[Rows, Rows]:
    """Rows that may prefill and rows that may decode, the excluded left out.

    Where blocks wait under a handle, decode is one that can pull them if there is any.

    Raises:
        Unavailable: no decode worker takes work.
    """
    prefilling, decoding = view.prefills, view.decodes
    if request.excluded:
        allowed = np.array([worker not in request.excluded for worker in view.ids], np.bool_)
        prefilling, decoding = prefilling & allowed, decoding & allowed
    decodes = np.flatnonzero(decoding)
    if not len(decodes):
        raise nobody_takes(request.adapter, RETRY_AFTER_S)
    if request.kv_connector:
        pulling = [row for row in decodes if view.connectors[row] == request.kv_connector]
        decodes = np.array(pulling, np.intp) if pulling else decodes
    prefills = np.flatnonzero(prefilling) if request.may_prefill else np.zeros(0, np.intp)
    return prefills, decodes
