"""Values of one sequence: what it is asked, what comes out, what happened."""

from collections.abc import Sequence
from dataclasses import dataclass

from omni_proxy.fleet import Fleet
from omni_proxy.metrics import Metrics
from omni_proxy.ports import FinishReason, LogprobRow
from omni_proxy.prompt_keys import PromptKeys
from omni_proxy.sampling import Sampling
from omni_proxy.scheduling.policy import Policy
from omni_proxy.tracing import Attribute


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the retries of one sequence."""

    max_attempts: int
    resume_timeout_s: float


@dataclass(frozen=True, slots=True)
class Scheduler:
    """Collaborators every sequence shares."""

    fleet: Fleet
    policy: Policy
    metrics: Metrics
    model: str
    limits: Limits
    keys: PromptKeys


@dataclass(frozen=True, slots=True)
class SequenceJob:
    """`deadline` is on the event loop's clock, in seconds."""

    request_id: str
    prompt: Sequence[int]
    sampling: Sampling
    deadline: float


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
            "omni.first_token_source": self.first_token_source,
            "omni.queue_ms": self.queue_ms,
            "omni.transfer_ms": self.transfer_ms,
            "omni.pull_fell_back": self.fell_back,
            "omni.retries": self.retries,
            "omni.resumes": self.resumes,
        }
