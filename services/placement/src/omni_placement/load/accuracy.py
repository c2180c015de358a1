"""How well forecasts of one phase come true: predicted shares against seen ones, a horizon later."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from omni_placement.load.forecast import Method, Smoothing, share_error, shares_of
from omni_placement.load.windows import Counts

# Forecasts waiting for their horizon to pass. Each holds an array per method.
OUTSTANDING = 4
# Weight of the newest of them in the means.
NEWEST = 0.3


@dataclass(frozen=True, slots=True, eq=False)
class _Issued:
    due: int
    by_method: list[Counts]
    seen_before: Counts


class Accuracy:
    """Keeps a few forecasts of every method until their horizon has passed; knows which misses least, and by what."""

    def __init__(self, shape: tuple[int, int], smoothing: Smoothing) -> None:
        self._methods, self._first = smoothing.methods, smoothing.first_method
        self._horizon = smoothing.horizon_intervals
        self._every = max(1, self._horizon // OUTSTANDING)
        self._issued: deque[_Issued] = deque()
        self._seen = np.zeros(shape)
        self._errors: Counts | None = None
        self.variance: Counts | None = None
        """Mean squared error of the shares, (layers, experts); None until something came due."""

    @property
    def method(self) -> Method:
        """The one that has missed least."""
        return self._first if self._errors is None else self._methods[int(np.argmin(self._errors))]

    @property
    def error(self) -> float | None:
        """What it has missed by lately, `share_error`."""
        return None if self._errors is None else float(self._errors.min())

    def close(self, interval: int, counts: Counts) -> None:
        """Take what was routed in `interval`, and judge what came due."""
        self._seen += counts
        while self._issued and self._issued[0].due <= interval:
            self._judge(self._issued.popleft())

    def issue(self, interval: int, forecast: Callable[[int, Method], Counts]) -> None:
        """Where it is time for another one, keep forecasts of the horizon that begins as `interval` ends."""
        if not self._issued or interval >= self._issued[-1].due - self._horizon + self._every:
            by_method = [forecast(self._horizon, method) for method in self._methods]
            self._issued.append(_Issued(interval + self._horizon, by_method, self._seen.copy()))

    def withdraw(self) -> None:
        """Forget what is outstanding: the horizon passed without tokens."""
        self._issued.clear()

    def _judge(self, issued: _Issued) -> None:
        seen = self._seen - issued.seen_before
        if not seen.any():
            return
        errors = np.array([share_error(predicted, seen) for predicted in issued.by_method])
        self._errors = errors if self._errors is None else self._errors + NEWEST * (errors - self._errors)
        predicted = issued.by_method[self._methods.index(self.method)]
        squared: Counts = (shares_of(predicted) - shares_of(seen)) ** 2
        self.variance = squared if self.variance is None else self.variance + NEWEST * (squared - self.variance)
