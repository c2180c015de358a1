"""Whether a worker that owes tokens has gone quiet. Pure.

Time is counted in ticks of a running proxy, not read from a clock: a proxy that was itself stopped for a while has
waited for one tick, and finds what came meanwhile before it blames anybody.
"""

from collections.abc import Callable

from omni_proxy.health import HealthSettings

TICK_S = 0.25


class StallWatch:
    """Of one worker. Call `tick` every `TICK_S` seconds."""

    def __init__(self, settings: Callable[[], HealthSettings]) -> None:
        """`settings`: those in force, which may change."""
        self._settings = settings
        self._now_s = 0.0
        self._came_at = 0.0
        self._heard_at = 0.0
        self._first_due = 0.0

    @property
    def silent_s(self) -> float:
        """Since the last load report."""
        return self._now_s - self._heard_at

    @property
    def is_silent(self) -> bool:
        return self.silent_s >= self._settings().silence_s

    def owes(self, predicted_s: float) -> None:
        """A sequence was sent, whose first token is foreseen in `predicted_s`.

        Counted from the last token of any: what goes on being sent to a stuck worker is no sign of its life.
        """
        self._first_due = max(self._first_due, self._came_at + self._settings().patience_s(predicted_s))

    def came(self) -> None:
        """Tokens arrived."""
        self._came_at = self._now_s

    def reported(self) -> None:
        """A load report arrived."""
        self._heard_at = self._now_s

    def tick(self, is_owing: bool, step_s: float) -> bool:
        """True when the worker is stuck; `step_s` is how long its steps are foreseen to last."""
        self._now_s += TICK_S
        if not is_owing:
            self._came_at = self._first_due = self._now_s
            return False
        patience_s = self._settings().patience_s(step_s)
        waited_s = patience_s + self._now_s - max(self._first_due, self._came_at + patience_s)
        return self._settings().is_stuck(waited_s, step_s, self.silent_s)
