"""What a token on the slowest rank costs, learned from measured steps."""

import math
from collections import deque

from omni_placement.load.windows import Window

# Weight of a window after the next one; about the newest 100 count.
KEEP = 0.99
LEAST_WINDOWS = 8
# The slope is believed when its standard error is below this share of it.
BELIEVED_ERROR = 0.3
# Share of a step taken for the slowest rank's tokens until a slope is believed.
ASSUMED_SHARE = 0.3
NEWEST = 64


class StepTime:
    """Straight line through (tokens of the slowest rank summed over layers, ms) of steps, by least squares.

    The slope is what placement can change; the rest of a step (attention, dense layers) is the other term. Whatever
    that is, tokens take no longer than the steps that they were computed in, so the least ms per token of the newest
    windows is an upper bound; windows with stalls or few tokens do not disturb it. `ASSUMED_SHARE` of it is taken until
    a slope is believed: an assumption, too high for engines whose steps are mostly attention.
    """

    def __init__(self) -> None:
        self._bounds: deque[float] = deque(maxlen=NEWEST)  # ms per token, were tokens all that steps take time for
        self._n = self._weight = self._x = self._y = self._xx = self._xy = self._yy = 0.0

    def add(self, window: Window) -> None:
        """Take a window that says how long its steps took and what each rank computed; others say nothing."""
        if window.rank_tokens is None or window.duration_ms <= 0:
            return
        x = float(window.rank_tokens.max(axis=1).sum()) / window.steps
        y = window.duration_ms / window.steps
        if x <= 0:
            return
        self._bounds.append(y / x)
        self._n += 1
        self._weight = KEEP * self._weight + 1.0
        share = 1.0 / self._weight
        dx, dy = x - self._x, y - self._y
        # Means and central moments, updated in a form that does not cancel.
        self._x += share * dx
        self._y += share * dy
        keep = 1.0 - share
        self._xx = keep * (self._xx + share * dx * dx)
        self._xy = keep * (self._xy + share * dx * dy)
        self._yy = keep * (self._yy + share * dy * dy)

    @property
    def ms_per_token(self) -> float | None:
        """ms per token on the slowest rank of a layer; None where no window says how long steps take."""
        if not self._bounds:
            return None
        bound = min(self._bounds)
        slope = self._slope
        return min(slope, bound) if slope is not None else ASSUMED_SHARE * bound

    @property
    def _slope(self) -> float | None:
        """None while too little is known or load did not vary."""
        if self._n < LEAST_WINDOWS or self._xx <= 0 or self._xy <= 0:
            return None
        slope = self._xy / self._xx
        unexplained = max(self._yy - slope * self._xy, 0.0) / max(self._weight - 2.0, 1.0)
        return slope if math.sqrt(unexplained / self._xx) <= BELIEVED_ERROR * slope else None
