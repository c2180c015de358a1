"""Simulated time: actions in order of their moment, and of entry where moments are equal."""

import heapq
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

    def run(self) -> None:
        """Until nothing is left to happen."""
        queue = self._queue
        while queue:
            self.now_s, _, action, args = heapq.heappop(queue)
            action(*args)
