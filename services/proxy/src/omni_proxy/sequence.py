"""Values of one sequence: what it is asked, what comes out, what happened."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from omni_proxy.explain import Explanations
from omni_proxy.fleet import Fleet
from omni_proxy.flow.gate import FlowGate
from omni_proxy.hedging import Hedging, HedgingSettings
from omni_proxy.metrics import Metrics
from omni_proxy.phases import Phase
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
    """How long answers are, as far as one can tell before they end: a moving average, at most what is allowed.

    The first guess counts as much as a few answers, and no answer for more than the last of about fifty.
    """

    _SMOOTHING = 0.02
    _GUESS_ANSWERS = 8

    def __init__(self, first_guess: float = 128.0) -> None:
        self._mean = first_guess
        self._answers = self._GUESS_ANSWERS

    def expect(self, max_tokens: int) -> int:
        return max(1, min(max_tokens, round(self._mean)))

    def saw(self, tokens: int) -> None:
        self._answers += 1
        self._mean += max(self._SMOOTHING, 1 / self._answers) * (tokens - self._mean)


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
    explanations: Explanations = field(default_factory=Explanations)
    hedging: Hedging = field(default_factory=lambda: Hedging(HedgingSettings.model_validate({})))


@dataclass(frozen=True, slots=True)
class SequenceJob:
    """`deadline` and `arrived` are on the event loop's clock, in seconds. Blocks are shared within one `cache_salt`.

    `adapter`: LoRA adapter; empty: the model itself.
    """

    request_id: str
    prompt: Sequence[int]
    sampling: Sampling
    deadline: float
    caller: Caller = NOBODY
    arrived: float = 0.0
    cache_salt: str = ""
    adapter: str = ""


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
    """In the order taken; a hedge has one of its own."""
    held_ms: float = 0.0
    schedule_ms: float = 0.0
    predicted_ttft_ms: float = 0.0
    first_token_source: str = ""
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    transfer_ms: float = 0.0
    fell_back: bool = False
    retries: int = 0
    resumes: int = 0
    is_hedged: bool = False
    is_resume_exact: bool = True
    """What followed a resumption is what an undisturbed run would have said, as far as engines compute alike."""
    first_token_ms: float | None = None
    """Since the request's arrival; `ended_ms` too."""
    ended_ms: float | None = None
    output_tokens: int = 0

    def decided(self, decision: Decision, seconds: float) -> None:
        self.decisions.append(decision)
        self.schedule_ms += seconds * 1e3

    def ended(self, ms: float, output_tokens: int) -> None:
        self.ended_ms, self.output_tokens = ms, output_tokens

    @property
    def decode_ms(self) -> float | None:
        """From the first token to the end; None until there."""
        if self.first_token_ms is None or self.ended_ms is None:
            return None
        return self.ended_ms - self.first_token_ms

    def phases(self) -> dict[Phase, float]:
        """Seconds of what took place. A pull that fell back has moved nothing."""
        if not self.decisions:
            return {}
        ms: dict[Phase, float | None] = {Phase.HOLD: self.held_ms, Phase.SCHEDULE: self.schedule_ms}
        if self.first_token_ms is not None:
            ms |= {Phase.QUEUE: self.queue_ms, Phase.PREFILL: self.prefill_ms, Phase.FIRST_TOKEN: self.first_token_ms}
            ms |= {Phase.TRANSFER: self.transfer_ms or None, Phase.DECODE: self.decode_ms}
        return {phase: value / 1e3 for phase, value in ms.items() if value is not None}

    def seen(self) -> dict[str, Any]:
        """What came, by the names of what was predicted; like that, `ttft_ms` leaves out the hold."""
        steps = self.output_tokens - 1
        return {
            "held_ms": round(self.held_ms, 3),
            "schedule_ms": round(self.schedule_ms, 3),
            "queue_ms": round(self.queue_ms, 3),
            "prefill_ms": round(self.prefill_ms, 3),
            "transfer_ms": round(self.transfer_ms, 3),
            "ttft_ms": None if self.first_token_ms is None else round(self.first_token_ms - self.held_ms, 3),
            "first_token_ms": None if self.first_token_ms is None else round(self.first_token_ms, 3),
            "step_ms": None if self.decode_ms is None or steps < 1 else round(self.decode_ms / steps, 3),
            "first_token_source": self.first_token_source,
            "prefill_worker": self.prefill_worker,
            "decode_worker": self.decode_worker,
            "cached_tokens": self.cached_tokens,
            "predicted_cached_tokens": self.predicted_cached_tokens,
            "output_tokens": self.output_tokens,
            "fell_back": self.fell_back,
            "retries": self.retries,
            "hedged": self.is_hedged,
            "resumes": self.resumes,
        }

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
            "omni.hedged": self.is_hedged,
            "omni.resume_exact": self.is_resume_exact,
        }
