"""A deterministic engine with a stated timing model; runs fleets on a laptop. A product, not a mock.

One engine step that computes `new` prompt tokens per sequence (over `context` tokens each) and one token for each
of `batch` running sequences (over `total_context` tokens together) lasts

    prefill part  a + sum(b * new + c * new * context)     if any prompt token is computed
    decode part   d + e * batch + f * total_context        if any sequence generates

milliseconds, times the slow factor. A pull of `n` bytes lasts latency + n / bandwidth.
"""

from omni_engine.sim.clock import Clock, VirtualClock, WallClock
from omni_engine.sim.engine import SimEngine
from omni_engine.sim.settings import Faults, SimSettings, Timing

__all__ = ["Clock", "Faults", "SimEngine", "SimSettings", "Timing", "VirtualClock", "WallClock"]
