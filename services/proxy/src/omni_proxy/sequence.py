"""Values of one sequence: what it is asked, what comes out, what happened."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from omni_proxy.fleet import Fleet
from omni_proxy.flow.gate import FlowGate
from omni_proxy.metrics import Metrics
from omni_proxy.ports import FinishReason, LogprobRow
from omni_proxy.prompt_keys import PromptKeys
from omni_proxy.sampling import Sampling
from omni_proxy.scheduling.decision import Decision
from omni_proxy.scheduling.request import NOBODY, Caller, SchedulingRequest
from omni_proxy.scheduling.view import FleetView
from omni_proxy.tracing import Attribute


class Chooser(Protocol):
    """The policy in force."""

    def choose(self, request: SchedulingRequest, view: FleetView) -> Decision:
        """Raises `Unavailable` when no decode worker takes work."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the retries of one sequence."""

    max_attempts: int
    resume_timeout_s: float


class OutputLengths:
    """How long answers are, as far as one can tell before they end: a moving average, at most what is allowed."""

    _SMOOTHING = 0.02

    def __init__(self, first_guess: float = 128.0) -> None:
        self._mean = first_guess

    def expect(self, max_tokens: int) -> int:
        return max(1, min(max_tokens, round(self._mean)))

    def saw(self, tokens: int) -> None:
        self._mean += self._SMOOTHING * (tokens - self._mean)


@dataclass(frozen=True, slots=True)
class Scheduler:
    """Collaborators every sequence shares."""

    fleet: Fleet
    policy: Chooser
    metrics: Metrics
    model: str
    limits: Limits
    keys: PromptKeys
    lengths: OutputLengths
    gate: FlowGate | None = None
    proxy_id: str = ""


@dataclass(frozen=True, slots=True)
class SequenceJob:
    """`deadline` and `arrived` are on the event loop's clock, in seconds."""

    request_id: str
    prompt: Sequence[int]
    sampling: Sampling
    deadline: float
    caller: Caller = NOBODY
    arrived: float = 0.0


@dataclass(slots=True)
class TokenBatch:
    """Tokens that arrived together; the last batch has a finish reason."""

    token_ids: Sequence[int]
    logprobs: Sequence[LogprobRow] = ()
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class SequenceRecord:
    """What happened, for spans, metrics and usage."""

    cached_tokens: int = 0
    predicted_cached_tokens: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""
    decision: str = ""
    decisions: list[Decision] = field(default_factory=list)
    """In the order taken; the first that computed the prompt made the prediction."""
    held_ms: float = 0.0
    predicted_ttft_ms: float = 0.0
    first_token_source: str = ""
    queue_ms: float = 0.0
    transfer_ms: float = 0.0
    fell_back: bool = False
    retries: int = 0
    resumes: int = 0

    def attributes(self) -> dict[str, Attribute]:
        return {
            "omni.cached_tokens": self.cached_tokens,
            "omni.predicted_cached_tokens": self.predicted_cached_tokens,
            "omni.prefill_worker_id": self.prefill_worker,
            "omni.decode_worker_id": self.decode_worker,
            "omni.decision": self.decision,
            "omni.held_ms": self.held_ms,
            "omni.predicted_ttft_ms": self.predicted_ttft_ms,
            "omni.first_token_source": self.first_token_source,
            "omni.queue_ms": self.queue_ms,
            "omni.transfer_ms": self.transfer_ms,
            "omni.pull_fell_back": self.fell_back,
            "omni.retries": self.retries,
            "omni.resumes": self.resumes,
        }
