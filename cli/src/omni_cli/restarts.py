"""When a process that died is started again. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Doubling delays, and a bound on deaths within a window: beyond it the process stays down."""

    first_delay_s: float = 1.0
    max_delay_s: float = 30.0
    max_deaths: int = 5
    window_s: float = 600.0

    def delay_s(self, deaths: Sequence[float], now: float) -> float | None:
        """Seconds to wait after the last of `deaths` (times, the last one included); None to give up."""
        recent = sum(1 for death in deaths if now - death <= self.window_s)
        if recent > self.max_deaths:
            return None
        return min(self.max_delay_s, self.first_delay_s * 2.0 ** max(0, recent - 1))
