"""What the life of a request needs from outside, and the values that cross.

PrefillPort.prefill(PrefillOrder) -> PrefillAnswer(first token, KvHandle)
DecodePort.submit(Submission)     -> Feed, filled once per engine step until it has an `end`
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from omni_proxy.feed import Feed
from omni_proxy.sampling import Sampling


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Timings:
    """Where one leg's time went, in milliseconds."""

    queue_ms: float = 0.0
    compute_ms: float = 0.0
    transfer_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class LogprobRow:
    """One generated token: the sampled entry first, then the best ones."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]


@dataclass(frozen=True, slots=True)
class KvHandle:
    """Leased blocks of a finished prefill, for one decode worker; `opaque` is the connector's own."""

    opaque: bytes
    engine_id: str
    lease_id: str
    num_tokens: int
    num_blocks: int
    block_size: int
    lease_s: float
    lease_ends_unix_ms: int = 0


@dataclass(frozen=True, slots=True)
class PrefillOrder:
    """`uncached_tokens`: what the worker is believed to compute; None where nobody knows.

    `adapter`: LoRA adapter of the model; empty: the model itself. So in a `Submission`.
    """

    request_id: str
    model: str
    token_ids: Sequence[int]
    sampling: Sampling
    block_keys: bytes
    proxy_id: str = ""
    uncached_tokens: int | None = None
    cache_salt: str = ""
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class PrefillAnswer:
    """`finish_reason` set means the sequence has ended; then there is no handle."""

    first_token_id: int
    finish_reason: FinishReason | None
    kv_handle: KvHandle | None
    cached_tokens: int
    timings: Timings
    logprobs: Sequence[LogprobRow] = ()


@dataclass(frozen=True, slots=True)
class Submission:
    """`token_ids` are the prompt, then `num_output_tokens` tokens the client already has.

    `uncached_tokens`: what the worker is believed to compute; None where nobody knows. `predicted_ms`: until its first
    token.
    """

    request_id: str
    model: str
    token_ids: Sequence[int]
    num_output_tokens: int
    sampling: Sampling
    kv_handle: KvHandle | None
    traceparent: str
    deadline_ms: int
    uncached_tokens: int | None = None
    predicted_ms: float = 0.0
    cache_salt: str = ""
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """What decode says with a sequence's first tokens."""

    cached_tokens: int
    pulled_tokens: int
    fell_back: bool
    timings: Timings = field(default_factory=Timings)


class PrefillPort(Protocol):
    @property
    def is_silent(self) -> bool:
        """The worker has not reported its load for longer than it would if it were well."""

    async def prefill(self, order: PrefillOrder, timeout_s: float, headers: Mapping[str, str]) -> PrefillAnswer:
        """Raises the `OmniError` the worker answered; cancelling aborts the prefill."""

    def release(self, lease_id: str) -> None:
        """End a lease soon, in the background."""


class DecodePort(Protocol):
    @property
    def ready(self) -> bool:
        """A session stands."""

    def submit(self, submission: Submission) -> Feed:
        """Raises `Unavailable` when no session stands."""

    def abort(self, feed: Feed) -> None:
        """Stop a sequence; its feed gets nothing more. Harmless when it has ended."""
