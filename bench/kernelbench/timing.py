"""Contenders timed in turn, by the processor time of their thread: wall time tells little on a machine in use."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

_SHORTEST_S = 2e-3
"""Of one repeat: calls are counted up until they take this long."""


def medians_us(contenders: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median microseconds a call of each, over `repeats` rounds in which each has its turn."""
    counts = {name: _calls(run) for name, run in contenders.items()}
    seen: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            seen[name].append(_time(run, counts[name]) / counts[name])
    return {name: statistics.median(values) * 1e6 for name, values in seen.items()}


def _calls(run: Callable[[], Any]) -> int:
    """How many calls make a repeat. The first call of all warms up."""
    run()
    return max(1, min(1000, int(_SHORTEST_S / max(_time(run, 3) / 3, 1e-7))))


def _time(run: Callable[[], Any], calls: int) -> float:
    began = time.thread_time()
    for _ in range(calls):
        run()
    return time.thread_time() - began
