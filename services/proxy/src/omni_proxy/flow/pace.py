"""How fast the queue moves, from what it did."""

_WEIGHT = 0.1
_MAX_GAP_MS = 10_000.0


class Pace:
    """Mean time between releases while others wait, in milliseconds: what one place in the queue costs."""

    def __init__(self) -> None:
        self._gap_ms: float | None = None
        self._last_s: float | None = None

    def released(self, now: float, *, was_backlog: bool) -> None:
        """`was_backlog`: others went on waiting, so the time to the next release is the workers' pace."""
        if self._last_s is not None:
            gap_ms = min((now - self._last_s) * 1e3, _MAX_GAP_MS)
            before = gap_ms if self._gap_ms is None else self._gap_ms
            self._gap_ms = before + _WEIGHT * (gap_ms - before)
        self._last_s = now if was_backlog else None

    def rested(self) -> None:
        """The queue was empty: what passed since the last release was nobody's pace."""
        self._last_s = None

    def gap_ms(self, default_ms: float) -> float:
        """`default_ms` until releases were seen."""
        return default_ms if self._gap_ms is None else self._gap_ms
