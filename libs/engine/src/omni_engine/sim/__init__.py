"""A deterministic engine with a stated timing model; runs fleets on a laptop. A product, not a mock.

One engine step that computes `new` prompt tokens per sequence (over `context` tokens each) and one token for each
of `batch` running sequences (over `total_context` tokens together) lasts

    prefill part  a + sum(b * new + c * new * context)     if any prompt token is computed
    decode part   d + e * batch + f * total_context        if any sequence generates

milliseconds, and `adapter_load_ms` for each LoRA adapter brought into a slot; all times the slow factor. A pull of `n`
bytes lasts latency + n / bandwidth.

With expert-parallel ranks (`SimSettings.experts`) the step lasts 1 - m + m * s times as long: m is the share of the
expert layers in a step whose ranks have even loads (`moe_share`), s the slowest rank's tokens summed over the layers,
divided by what they would be if all ranks had the same. A round of expert moves copies beside the steps, for the
bytes of the busiest rank's busiest direction / bandwidth, and then pauses the engine for `switch_ms` at a boundary.
"""

from omni_engine.sim.clock import Clock, VirtualClock, WallClock
from omni_engine.sim.engine import SimEngine
from omni_engine.sim.settings import ExpertSettings, Faults, SimSettings, Timing

__all__ = ["Clock", "ExpertSettings", "Faults", "SimEngine", "SimSettings", "Timing", "VirtualClock", "WallClock"]
