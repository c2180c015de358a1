"""One sequence or prefill inside the simulated engine."""

import asyncio
from dataclasses import dataclass, field

from omni_engine.ports import KvHandle, PrefillResult, SamplingParams, StepSink
from omni_engine.sim.tokens import TokenStream


@dataclass(slots=True, eq=False)
class SimSequence:
    """`computed` of `tokens` have their keys and values in `blocks`; times are on the engine's clock."""

    request_id: str
    tokens: list[int]
    num_prompt: int
    sampling: SamplingParams
    stream: TokenStream
    salt: str
    arrived_s: float
    sink: StepSink | None = None
    result: "asyncio.Future[PrefillResult] | None" = None
    handle: KvHandle | None = None
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    computed: int = 0
    cached: int = 0
    pulled: int = 0
    generated: int = 0
    fell_back: bool = False
    has_started: bool = False
    scheduled_s: float | None = None
    transfer_s: float = 0.0
    pull: "asyncio.Task[None] | None" = None

    @property
    def uncomputed(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def num_output(self) -> int:
        """Tokens generated so far, here or elsewhere."""
        return len(self.tokens) - self.num_prompt
