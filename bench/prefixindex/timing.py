"""Latencies of calls: how they are taken, and what is said of them."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sidebyside.ranks import quantile

_OTHER_BYTES = 64 * 1024**2


@dataclass(frozen=True, slots=True)
class Latency:
    """Microseconds over `count` calls. A p99 of fewer than 100 calls is their maximum."""

    p50_us: float
    p99_us: float
    count: int


def latency_of(seconds: Sequence[float]) -> Latency:
    """Nearest-rank percentiles."""
    ranked = sorted(seconds)
    return Latency(quantile(ranked, 0.5) * 1e6, quantile(ranked, 0.99) * 1e6, len(ranked))


class OtherWork:
    """Reads 64 MiB, so that the next call finds the processor's caches full of something else."""

    def __init__(self) -> None:
        self._data = np.ones(_OTHER_BYTES // 8)

    def __call__(self) -> None:
        self._data.sum()


def timed(
    calls: Iterator[Callable[[], object]],
    before_each: Callable[[], object],
    *,
    most: int,
    budget_s: float,
) -> list[float]:
    """Seconds of each call, at most `most` of them and none begun after `budget_s`; at least three."""
    taken: list[float] = []
    end_s = time.perf_counter() + budget_s
    while len(taken) < most and (len(taken) < 3 or time.perf_counter() < end_s):
        call = next(calls)
        before_each()
        start_s = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start_s)
    return taken
