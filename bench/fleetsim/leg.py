"""Values of the simulated engine: a sequence on it, steps under way, what it tells."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Leg:
    """A sequence on one engine: a prefill leg generates one token, a decode leg the rest, or all of them.

    `pulls` says that its prompt comes from another engine. `on_first` is called with the first token of a prompt that
    was computed here, `on_pulled` when the prompt's blocks have come, `on_end` with the last token. Times in seconds.
    """

    keys: Sequence[bytes]
    prompt_tokens: int
    output_tokens: int
    pulls: bool = False
    keeps_blocks: bool = False
    on_first: Callable[["Leg"], None] | None = None
    on_pulled: Callable[["Leg"], None] | None = None
    on_end: Callable[["Leg"], None] | None = None
    computed: int = 0
    cached: int = 0
    named: int = 0
    blocks: list[int] = field(default_factory=list)
    arrived_s: float = 0.0
    scheduled_s: float = 0.0
    first_s: float = 0.0
    ended_s: float = 0.0
    transfer_s: float = 0.0
    first_step: int = 0
    gaps: list[tuple[int, float]] = field(default_factory=list)
    """Of decode: so many steps of such a length in seconds, in order."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What a worker says of itself; the counters only grow."""

    running: int
    waiting: int
    queued_tokens: int
    kv_usage: float
    context_tokens: int
    steps: int
    busy_ms: float
    computed_prompt_tokens: int


@dataclass(slots=True)
class Plan:
    """Steps from `start_s` on: the first takes `first_ms`, each further one `growth_ms` more; all times `factor`."""

    start_s: float
    first_ms: float
    growth_ms: float
    steps: int
    factor: float
    is_run: bool
    chunks: list[tuple[Leg, int]]

    def length_ms(self, steps: int) -> float:
        return self.factor * steps * (self.first_ms + self.growth_ms * (steps - 1) / 2)

    def end_of(self, step: int) -> float:
        return self.start_s + self.length_ms(step) / 1e3

    def steps_by(self, now_s: float) -> int:
        """Whole steps that have ended."""
        passed = (now_s - self.start_s) * 1e3 / self.factor
        first = self.first_ms - self.growth_ms / 2
        if self.growth_ms > 0:
            done = (math.sqrt(first * first + 2 * self.growth_ms * passed) - first) / self.growth_ms
        else:
            done = passed / first
        return min(self.steps, max(0, int(done + 1e-9)))
