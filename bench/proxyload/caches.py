"""What the machine's caches hold after a while: the price of every line of memory that a request comes back to."""

import statistics
import time

import numpy as np
from numba import njit
from numpy.typing import NDArray
from sidebyside import cores

LINE_BYTES = 64
HELD_BYTES = 512 * 1024
"""Less than the second-level cache of a server's core."""
_WORDS_PER_LINE = LINE_BYTES // 8


def line_ns(core: int, gap_ms: float, reads: int) -> float:
    """Nanoseconds per cache line of `HELD_BYTES` read a moment ago and again after `gap_ms` of sleep; median of reads.

    Lines are visited in random order, each read naming the next, so that nothing is fetched ahead.
    """
    chain = _chain(HELD_BYTES // LINE_BYTES)
    with cores.on({core}):
        return statistics.median(_again_ns(chain, gap_ms / 1e3) for _ in range(reads))


def _again_ns(chain: NDArray[np.int64], gap_s: float) -> float:
    for _ in range(3):
        _visit(chain)
    time.sleep(gap_s)
    began_ns = time.perf_counter_ns()
    _visit(chain)
    return (time.perf_counter_ns() - began_ns) / (len(chain) // _WORDS_PER_LINE)


def _chain(lines: int) -> NDArray[np.int64]:
    """A cycle through all lines: the first word of each is the index of the next one's."""
    order = np.random.default_rng(0).permutation(lines) * _WORDS_PER_LINE
    chain = np.zeros(lines * _WORDS_PER_LINE, np.int64)
    chain[order] = np.roll(order, -1)
    return chain


@njit("int64(int64[::1])", cache=False)  # type: ignore[untyped-decorator]
def _visit(chain: NDArray[np.int64]) -> int:
    at = 0
    for _ in range(len(chain) // _WORDS_PER_LINE):
        at = chain[at]
    return at
