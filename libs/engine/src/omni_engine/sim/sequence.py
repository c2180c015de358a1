"""One sequence or prefill inside the simulated engine."""

import asyncio
from dataclasses import dataclass, field

from omni_engine.ports import KvHandle, PrefillResult, SamplingParams, StepSink, Timings
from omni_engine.sim.tokens import TokenStream


@dataclass(slots=True, eq=False)
class SimSequence:
    """`computed` of `tokens` have their keys and values in `blocks`; times are on the engine's clock.

    `believed_tokens` of the prompt count as queued until it runs. `traffic_class` decides which experts it prefers,
    `adapter` must lie in a slot while it runs. `handle` is of blocks that were not pulled yet.
    """

    request_id: str
    tokens: list[int]
    num_prompt: int
    sampling: SamplingParams
    stream: TokenStream
    salt: str
    arrived_s: float
    believed_tokens: int
    traffic_class: int = 0
    adapter: str = ""
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

    def timings(self, now_s: float) -> Timings:
        """Where the time went until now, the moment of the first token."""
        scheduled_s = now_s if self.scheduled_s is None else self.scheduled_s
        return Timings(
            queue_ms=(scheduled_s - self.arrived_s) * 1e3,
            compute_ms=(now_s - scheduled_s - self.transfer_s) * 1e3,
            transfer_ms=self.transfer_s * 1e3,
            total_ms=(now_s - self.arrived_s) * 1e3,
        )

    @property
    def uncomputed(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def num_output(self) -> int:
        """Tokens generated so far, here or elsewhere."""
        return len(self.tokens) - self.num_prompt
