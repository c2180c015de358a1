"""Reported expert load: the newest windows of one stream, a stream being one phase and traffic class of a group."""

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from omni_common.errors import InvalidRequest
from omni_placement.layout import Numbers

Counts = npt.NDArray[np.float64]


class Phase(StrEnum):
    """What the steps of a window did; `MIXED` is an engine that does both or does not say."""

    MIXED = "mixed"
    PREFILL = "prefill"
    DECODE = "decode"


class Stream(NamedTuple):
    """Load that is kept apart, because its experts differ and its rate has a course of its own."""

    phase: Phase
    traffic_class: str


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Tokens per (layer, logical expert) that one worker routed in engine steps `first_step` to `last_step`.

    `duration_ms` is what those steps took together and `rank_tokens` the tokens each rank computed, (layers, ranks);
    0 and None where the engine does not say. A window of no length is an `InvalidRequest`.
    """

    worker_id: str
    first_step: int
    last_step: int
    tokens: Numbers
    phase: Phase = Phase.MIXED
    traffic_class: str = ""
    layout_version: int = 0
    duration_ms: float = 0.0
    rank_tokens: Numbers | None = None

    def __post_init__(self) -> None:
        if self.last_step < self.first_step:
            raise InvalidRequest("last_step lies before first_step", field="last_step")

    @property
    def name(self) -> tuple[str, int, int]:
        return self.worker_id, self.first_step, self.last_step

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step + 1

    @property
    def stream(self) -> Stream:
        return Stream(self.phase, self.traffic_class)


class Windows:
    """At most `bound` windows of one stream, and their sum."""

    def __init__(self, shape: tuple[int, ...], bound: int) -> None:
        self._kept: deque[tuple[float, Window]] = deque()
        self._names: set[tuple[str, int, int]] = set()
        self._total = np.zeros(shape, dtype=np.int64)
        self._bound = bound

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def newest_s(self) -> float:
        """When the newest window came. There is one as soon as the stream exists."""
        return self._kept[-1][0]

    def add(self, window: Window, at_s: float) -> bool:
        """Take a window; False for one already there (same worker and steps)."""
        if window.name in self._names:
            return False
        self._kept.append((at_s, window))
        self._names.add(window.name)
        self._total += window.tokens
        if len(self._kept) > self._bound:
            _, oldest = self._kept.popleft()
            self._names.discard(oldest.name)
            self._total -= oldest.tokens
        return True

    def total(self) -> Numbers:
        """Sum of the windows kept, int64 (layers, experts)."""
        return self._total.copy()
