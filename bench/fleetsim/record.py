"""What became of one request."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Guess(NamedTuple):
    """What was predicted when the decision was taken, and what came, in milliseconds."""

    predicted_ms: float
    seen_ms: float

    @property
    def error(self) -> float:
        return abs(self.predicted_ms - self.seen_ms) / self.seen_ms


@dataclass(slots=True)
class Served:
    """Times as the proxy sees them. Gaps: the one between the first token and the second holds transfer and seat."""

    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    unloaded_s: float
    tenant: str = ""
    cached_tokens: int = 0
    disaggregated: bool = False
    hold_s: float = 0.0
    queue_s: float = 0.0
    """On the worker that computed the prompt, until its turn."""
    compute_s: float = 0.0
    handoff_s: float = 0.0
    """From the first token until decode begins."""
    transfer_s: float = 0.0
    ttft_s: float = math.inf
    ended_s: float = math.inf
    gaps: list[tuple[int, float]] = field(default_factory=list)
    """(how many, seconds)."""
    prompt_guess: Guess | None = None
    step_guess: Guess | None = None
    transfer_guess: Guess | None = None
    worker: str = ""
    ends: int = 0

    @property
    def itl_s(self) -> float:
        """Mean gap; 0 with one token."""
        count = sum(n for n, _ in self.gaps)
        return sum(n * gap for n, gap in self.gaps) / count if count else 0.0

    def gap_s(self, share: float) -> float:
        """The gap that this share of the request's gaps do not exceed."""
        return weighted_quantile(self.gaps, share)


def weighted_quantile(pairs: Sequence[tuple[int, float]], share: float) -> float:
    total = sum(n for n, _ in pairs)
    rank, seen = share * total, 0
    for count, value in sorted(pairs, key=lambda pair: pair[1]):
        seen += count
        if seen >= rank:
            return value
    return 0.0
