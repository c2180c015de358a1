"""How busy the proxy itself is: its event loop is one thread, and what that has no time for waits in no queue."""

import asyncio
import math
import time

from prometheus_client import CollectorRegistry, Counter, Histogram

_EVERY_S = 0.1
_MEMORY_S = 5.0
_LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Pulse:
    """`busy`: of a core, the share that the event loop's thread took over the latest seconds. `lag_ms`: by how much
    what was due on the loop came late, mean over the same time.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.busy = 0.0
        self.lag_ms = 0.0
        self._lag = Histogram(
            "omni_proxy_event_loop_lag_seconds", "How late what is due runs", buckets=_LAG, registry=registry
        )
        self._busy = Counter("omni_proxy_event_loop_busy_seconds", "CPU of the event loop's thread", registry=registry)

    async def run(self) -> None:
        """Beat for ever, on the loop that is watched."""
        began_s, cpu_s = time.monotonic(), time.thread_time()
        while True:
            await asyncio.sleep(_EVERY_S)
            ended_s, used_s = time.monotonic(), time.thread_time()
            self.beat(ended_s - began_s, used_s - cpu_s)
            began_s, cpu_s = ended_s, used_s

    def beat(self, passed_s: float, busy_s: float) -> None:
        """One beat: how long ago the one before was, and for how long the thread has computed since."""
        lag_s = max(0.0, passed_s - _EVERY_S)
        self._lag.observe(lag_s)
        self._busy.inc(busy_s)
        weight = 1 - math.exp(-passed_s / _MEMORY_S)
        self.busy += weight * (busy_s / passed_s - self.busy)
        self.lag_ms += weight * (lag_s * 1e3 - self.lag_ms)
