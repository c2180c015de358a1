"""What was decided for the latest requests and what came of it, for people who ask why.

Decisions are kept as they are, and made readable when asked for: a request pays for a reference. They name workers and
costs; prompts are neither kept nor repeated.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

import orjson

from omni_common.errors import OmniError
from omni_proxy.scheduling.decision import Decision, Reason

MAX_SEQUENCES = 1024
MAX_HEADER_BYTES = 2000
"""Of `x-omni-decision`; servers and proxies in between refuse headers of 4 KiB to 8 KiB in all."""
EXPLAIN_HEADER = "x-omni-explain"
DECISION_HEADER = "x-omni-decision"
_HEADER_CANDIDATES = (3, 1, 0)
_TRACE_CANDIDATES = 5


class Account(Protocol):
    """What happened to one sequence, while it happens."""

    @property
    def decisions(self) -> Sequence[Decision]:
        """In the order taken; more than one where legs were tried again."""

    def seen(self) -> Mapping[str, Any]:
        """Times and counts beside which the predictions are put."""


@dataclass(slots=True)
class Explained:
    """One request. `sequences` are live: they fill while the request runs; `status` is None until it has ended."""

    request_id: str
    sequences: Sequence[Account]
    tenant: str = ""
    priority: int = 0
    adapter: str = ""
    """LoRA adapter it names; empty: the model itself."""
    arrived: datetime = field(default_factory=lambda: datetime.now(UTC))
    status: int | None = None
    error: str | None = None
    reason: str | None = None
    seen: Mapping[str, Any] = field(default_factory=dict)

    def ended(self, status: int, error: OmniError | None, seen: Mapping[str, Any]) -> None:
        self.status, self.seen = status, seen
        if error is not None:
            self.error, self.reason = error.code, error.reason or None

    def to_json(self, limit: int | None = None) -> dict[str, Any]:
        """Every decision with at most `limit` candidates of each leg."""
        return self._head() | {
            "seen": dict(self.seen),
            "sequences": [
                {"decisions": [d.explained(limit) for d in sequence.decisions], "seen": dict(sequence.seen())}
                for sequence in self.sequences
            ],
        }

    def summary(self) -> dict[str, Any]:
        """One line: the first sequence's decision stands for all."""
        decision = prompt_decision(self.sequences[0])
        explained = None if decision is None else decision.explained(0)
        if explained is not None:
            del explained["candidates"]
        return self._head() | {
            "num_sequences": len(self.sequences),
            "num_decisions": sum(len(sequence.decisions) for sequence in self.sequences),
            "decision": explained,
            "seen": dict(self.seen) | {"ttft_ms": self.sequences[0].seen().get("ttft_ms")},
        }

    def _head(self) -> dict[str, Any]:
        return {
            "request_id": self.request_id,
            "arrived": self.arrived.isoformat(timespec="milliseconds"),
            "tenant": self.tenant,
            "priority": self.priority,
            "adapter": self.adapter,
            "status": self.status,
            "error": self.error,
            "reason": self.reason,
        }


class Explanations:
    """The latest requests by id, at most `max_sequences` of their sequences together; the oldest go first.

    Of requests with the same id the latest is known.
    """

    def __init__(self, max_sequences: int = MAX_SEQUENCES) -> None:
        self._max_sequences = max_sequences
        self._num_sequences = 0
        self._requests: OrderedDict[str, Explained] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    def begin(self, request: Explained) -> None:
        self._forget(self._requests.pop(request.request_id, None))
        self._requests[request.request_id] = request
        self._num_sequences += len(request.sequences)
        while self._num_sequences > self._max_sequences and len(self._requests) > 1:
            self._forget(self._requests.popitem(last=False)[1])

    def get(self, request_id: str) -> Explained | None:
        return self._requests.get(request_id)

    def latest(self, limit: int) -> list[Explained]:
        """Newest first."""
        newest = reversed(self._requests.values())
        return [request for request, _ in zip(newest, range(limit), strict=False)]

    def _forget(self, request: Explained | None) -> None:
        if request is not None:
            self._num_sequences -= len(request.sequences)


def prompt_decision(account: Account) -> Decision | None:
    """The one by which the prompt was computed: of those that were not about going on the one whose prefill worker
    answered, as of two beside each other the earlier one may have, else the last.
    """
    decisions, answered = account.decisions, account.seen().get("prefill_worker")
    prompts = [decision for decision in decisions if decision.reason is not Reason.CONTINUED]
    by_answer = [decision for decision in prompts if answered and decision.prefill == answered]
    return (by_answer or prompts or decisions)[-1] if decisions else None


def header_value(account: Account) -> str:
    """The prompt's decision as ASCII JSON of at most `MAX_HEADER_BYTES`: fewer candidates where it is long."""
    decision = prompt_decision(account)
    if decision is None:
        return "{}"
    for limit in _HEADER_CANDIDATES:
        value = json.dumps(_finite(decision.explained(limit)), separators=(",", ":"))
        if len(value) <= MAX_HEADER_BYTES:
            return value
    return "{}"


def span_attributes(decision: Decision) -> dict[str, str | int | float | bool]:
    """The choice, what it was expected to take, and its best candidates as JSON."""
    explained = decision.explained(_TRACE_CANDIDATES)
    return {
        "omni.policy": decision.policy,
        "omni.decision": str(decision.reason),
        "omni.prefill_worker_id": decision.prefill or "",
        "omni.decode_worker_id": decision.decode,
        "omni.uncached_tokens": decision.uncached_tokens,
        **{f"omni.predicted_{name}": value for name, value in explained["predicted"].items()},
        "omni.candidates": orjson.dumps(explained["candidates"]).decode(),
    }


def _finite(value: Any) -> Any:
    """As JSON has it: what is not finite is null."""
    return orjson.loads(orjson.dumps(value))
