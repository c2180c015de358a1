"""Simulated time: actions in order of their moment, and of entry where moments are equal."""

import heapq
import math
from collections.abc import Callable
from typing import Any


class Clock:
    """Seconds since the simulation began."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._entered = 0

    def __call__(self) -> float:
        return self.now_s

    def at(self, at_s: float, action: Callable[..., None], *args: Any) -> None:
        self._entered += 1
        heapq.heappush(self._queue, (at_s, self._entered, action, args))

    def after(self, delay_s: float, action: Callable[..., None], *args: Any) -> None:
        self.at(self.now_s + delay_s, action, *args)

    def next_tick(self, phase_s: float, period_s: float) -> float:
        """The next of the moments `period_s` apart, one of which is `phase_s`; with a period of 0 all are."""
        ticks = math.floor((self.now_s - phase_s) / period_s) + 1 if period_s else 0
        return max(self.now_s, phase_s + ticks * period_s)

    def run(self) -> None:
        """Until nothing is left to happen."""
        queue = self._queue
        while queue:
            self.now_s, _, action, args = heapq.heappop(queue)
            action(*args)
