"""The `Engine` port and the values that cross it. Token ids in, token ids out; nobody here knows text or the wire.

Life of one sequence across two engines:

    prefill engine:  prefill(PrefillJob) -> PrefillResult(first token, KvHandle)   blocks held under a lease
    decode engine:   submit(DecodeJob with that handle, sink)                      pulls the blocks, then
                     sink(StepOutput) once per engine step that produced tokens    until one has `finish_reason`
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from omni_common.errors import Unavailable


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Medium(StrEnum):
    """Where a block's keys and values lie."""

    HBM = "hbm"
    HOST = "host"
    DISK = "disk"
    REMOTE = "remote"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn; the proxy has validated the ranges."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Row-major: `width` entries for each generated token, the sampled token first."""

    width: int
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    sampled_ranks: Sequence[int]


@dataclass(frozen=True, slots=True)
class Timings:
    """Where one leg's time went, in milliseconds."""

    queue_ms: float = 0.0
    compute_ms: float = 0.0
    transfer_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class KvHandle:
    """What another engine needs to pull the blocks of a finished prefill; `opaque` is the connector's own.

    `lease_ends_unix_ms` is by the holder's clock; 0 if it does not tell. It is for one puller.
    """

    opaque: bytes
    engine_id: str
    lease_id: str
    num_tokens: int
    num_blocks: int
    block_size: int
    lease_s: float
    lease_ends_unix_ms: int = 0


@dataclass(frozen=True, slots=True)
class PrefillJob:
    """`uncached_tokens` is what the caller believes is to be computed; None: all of the prompt.

    `adapter` names one of `EngineInfo.adapters`; empty: the model itself.
    """

    request_id: str
    token_ids: Sequence[int]
    sampling: SamplingParams
    cache_salt: str = ""
    uncached_tokens: int | None = None
    adapter: str = ""

    @property
    def believed_tokens(self) -> int:
        """Prompt tokens that count as queued until the engine knows better."""
        return _at_most(len(self.token_ids), self.uncached_tokens)


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """`kv_handle` is None when the sequence ended with its first token; then `finish_reason` says how."""

    first_token_id: int
    finish_reason: FinishReason | None
    kv_handle: KvHandle | None
    cached_tokens: int
    timings: Timings
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """`token_ids` are the prompt and then `num_output_tokens` tokens generated elsewhere.

    With a handle its `num_tokens` leading tokens are pulled; without one all are computed here. `uncached_tokens` is
    what the caller believes is to be computed; None: all that is not pulled. `adapter` as in `PrefillJob`; the handle's
    blocks were computed with the same.
    """

    request_id: str
    token_ids: Sequence[int]
    sampling: SamplingParams
    num_output_tokens: int = 0
    kv_handle: KvHandle | None = None
    cache_salt: str = ""
    uncached_tokens: int | None = None
    adapter: str = ""

    @property
    def believed_tokens(self) -> int:
        """Prompt tokens that count as queued until the engine knows better."""
        pulled = self.kv_handle.num_tokens if self.kv_handle is not None and self.uncached_tokens is None else 0
        return max(0, _at_most(len(self.token_ids), self.uncached_tokens) - pulled)


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """Sent with a sequence's first tokens."""

    cached_tokens: int
    pulled_tokens: int
    fell_back: bool
    timings: Timings


@dataclass(slots=True)
class SequenceOutput:
    """What one engine step produced for one sequence."""

    request_id: str
    token_ids: Sequence[int]
    finish_reason: FinishReason | None = None
    start: SequenceStart | None = None
    logprobs: Logprobs | None = None
    detail: str = ""


StepSink = Callable[[list[SequenceOutput]], None]
"""Called on the event loop, once per engine step and sink; must not block."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is; constant while it lives. Counts are in tokens and blocks.

    A prefix block is held when all `num_block_groups` groups of layers hold it. `fixed_role` says what the engine was
    started for where it cannot do anything else, and how to start it so that it can; empty: it takes any role.
    Experts are spread over `num_ep_ranks` ranks, each with `expert_slots_per_rank` places per layer; 0 and 0 without
    expert parallelism. `ranks_per_host` consecutive ranks share a host (0: all do); one expert of one layer has weights
    of `expert_bytes` (0: unknown). `speculative` is the drafter and its tokens as 'mtp:2', empty without one.
    `adapters` are the LoRA adapters it serves, sorted; bringing one into a slot takes `adapter_load_ms` (0: unknown).
    `weights` are digests of the model's own weights (by the empty name) and the adapters', as far as they are known.
    """

    model: str
    engine: str
    engine_version: str
    engine_id: str
    kv_connector: str
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_moe_layers: int = 0
    num_experts: int = 0
    num_block_groups: int = 1
    fixed_role: str = ""
    num_ep_ranks: int = 0
    expert_slots_per_rank: int = 0
    ranks_per_host: int = 0
    expert_bytes: int = 0
    speculative: str = ""
    adapters: tuple[str, ...] = ()
    adapter_load_ms: float = 0.0
    weights: Mapping[str, str] = field(default_factory=dict)

    def weights_of(self, adapter: str) -> str:
        """Of all that computes a sequence with the adapter; empty: the model alone."""
        return "+".join(self.weights.get(name, "") for name in dict.fromkeys(("", adapter)))


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Load as the engine last reported it.

    `context_tokens` are those of the sequences that generate. `steps` are the steps so far that generated and whose
    wall time is known; `busy_ms` is the sum of these times. With speculative decoding a step gives a sequence several
    tokens: it counts as so many steps, the mean over its sequences, and `step_ms` is the time of one of them.
    Of `drafted_tokens` so far, `accepted_tokens` were right, `accepted_by_position` in each place of a draft.
    `adapters` lie in the engine's slots: those of its sequences, then the last used.
    """

    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    kv_usage: float = 0.0
    leases: int = 0
    step_ms: float = 0.0
    generated_tokens: int = 0
    computed_prompt_tokens: int = 0
    context_tokens: int = 0
    steps: int = 0
    busy_ms: float = 0.0
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_by_position: tuple[int, ...] = ()
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """One more copy of each block, holding `token_ids`, following the block named `parent` (None: start of a prompt).

    Hashes are the engine's own; the relay translates them to block keys. Without `token_ids` the engine does not tell
    what the blocks hold: only those it told of before have a key. `extras` are as in `omni_common.blocks`, one for
    each block, or none at all. `group` numbers the groups of layers a prefix needs, from 0; each reports for itself.
    """

    block_hashes: Sequence[bytes]
    parent: bytes | None
    token_ids: Sequence[int]
    block_size: int
    medium: Medium = Medium.HBM
    cache_salt: str = ""
    adapter: str = ""
    extras: Sequence[bytes] = ()
    group: int = 0


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """One copy less of each block. An engine may hold a block several times; the last copy's end ends the block."""

    block_hashes: Sequence[bytes]
    medium: Medium = Medium.HBM
    group: int = 0


@dataclass(frozen=True, slots=True)
class BlocksCleared:
    """Nothing is cached any more."""


BlockEvent = BlocksStored | BlocksRemoved | BlocksCleared


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Events of one engine step; `sequence` is consecutive, so a gap shows a loss.

    `occurred_unix_ms` is 0 where the engine does not tell. `skipped` counts blocks of the step that are not among the
    events, by reason. `is_replayed` where the engine's stream had lost the batch and it was fetched again.
    """

    sequence: int
    events: Sequence[BlockEvent]
    occurred_unix_ms: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    is_replayed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLoad:
    """What the router did since the last read.

    `tokens`: int64 (layers, experts), tokens routed to each logical expert. `rank_tokens`: int64 (layers, ranks), what
    each rank had to compute of them since the layout in force, `layout_version`, came into force; None where it is not
    measured. `routed_tokens` tokens went through the model, in `steps` steps that took `duration_ms` together.
    """

    tokens: npt.NDArray[np.int64]
    rank_tokens: npt.NDArray[np.int64] | None = None
    layout_version: int = 0
    steps: int = 0
    duration_ms: float = 0.0
    routed_tokens: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLayout:
    """Which logical expert lies in each physical slot: int32 (layers, ranks, slots), -1 for an empty one."""

    version: int
    physical: npt.NDArray[np.int32]


class RanksFailed(Unavailable):
    """Expert-parallel ranks did not do their part of a round."""

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message, reason="rank_failed")
        self.ranks = tuple(ranks)


@dataclass(frozen=True, slots=True)
class ExpertMove:
    """The weights of one expert of one layer, copied from one physical slot to another."""

    layer: int
    expert: int
    source_rank: int
    source_slot: int
    target_rank: int
    target_slot: int


KernelCalls = Mapping[str, Mapping[str, int]]
"""op -> backend -> calls since the start, of all ranks together."""


class Engine(Protocol):
    """One model on one engine. Coroutines may be cancelled; cancelling frees what the call held."""

    @property
    def info(self) -> EngineInfo: ...

    async def start(self) -> None:
        """Load the model and warm up. Raises `Internal` when the engine cannot start."""

    async def prefill(self, job: PrefillJob) -> PrefillResult:
        """Compute a prompt's KV blocks and first token, and lease the blocks.

        Raises `InvalidRequest` for a prompt the engine cannot hold, `Unavailable` when the engine is dead.
        """

    async def release(self, lease_id: str) -> bool:
        """End a lease early; False if there is none of that name (pulled, expired, never was).

        The name of the prefill's request does too, for a caller who never saw the answer.
        """

    async def submit(self, job: DecodeJob, sink: StepSink) -> None:
        """Start a sequence; its outputs go to `sink`, the last one with a finish reason.

        Raises `InvalidRequest` or `Unavailable` as `prefill` does; then `sink` is never called.
        """

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Stop sequences and prefills and free their blocks; unknown ids are ignored; no output follows."""

    def stats(self) -> EngineStats: ...

    def events(self) -> AsyncIterator[EventBatch]:
        """Block events from now on; one consumer."""

    async def expert_load(self) -> ExpertLoad | None:
        """Router counts since the last call; None where the engine does not report them."""

    def expert_layout(self) -> ExpertLayout | None:
        """What the ranks hold and route by; None without expert parallelism or where experts cannot be moved."""

    async def move_experts(self, moves: Sequence[ExpertMove], layout: ExpertLayout) -> None:
        """One round: copy the weights, then route by `layout`, on all ranks at the same step boundary.

        Every source is read before any target is written. Slots that are not a target keep what they hold or become
        empty. Raises `InvalidRequest` for a round that does not lead from what is held to `layout`, `RanksFailed` or
        another `Unavailable` when it could not be done; then the former layout stays in force.
        """

    async def drop_ranks(self, ranks: Sequence[int]) -> None:
        """Route to no replica on these ranks, from the next step on; none named: all ranks are used again.

        Raises `InvalidRequest` naming experts that live on no other rank; then nothing changes.
        """

    async def kernel_calls(self) -> KernelCalls | None:
        """What ran on Omni's ops; None where the engine runs on its own only.

        Raises `Unavailable` when it cannot be asked.
        """

    async def wait_dead(self) -> str:
        """Returns why, once the engine has died on its own."""

    async def close(self) -> None: ...


def _at_most(limit: int, given: int | None) -> int:
    return limit if given is None else min(limit, given)
