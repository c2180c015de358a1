"""What vLLM's engine core reports of a step, as far as `Tracker` reads it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Output:
    """One request's part of a step."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None
    new_logprobs: Any = None
    events: Any = None
    prefill_stats: Any = None


@dataclass
class Drafts:
    """A step's counts of drafted tokens."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: list[int]


@dataclass
class Stats:
    spec_decoding_stats: Drafts | None
    num_running_reqs: int = 1
    num_waiting_reqs: int = 0
    kv_cache_usage: float = 0.0


@dataclass
class Step:
    timestamp: float
    outputs: list[Output] = field(default_factory=list)
    scheduler_stats: Stats | None = None
    engine_index: int = 0
