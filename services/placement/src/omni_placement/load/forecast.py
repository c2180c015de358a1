"""What a stream will route: how many tokens, and which share of them each expert gets.

Both are smoothed apart, because they move apart. Over a day the rate of a traffic class doubles and halves while its
experts stay nearly the same; what changes the load of a group is then the mix of its classes.

    rate    tokens/s of each layer                 exponentially weighted mean, and a trend
    shares  of the layer's tokens for each expert  ratio of two exponentially weighted counts, and a trend

Weighing by counts means that a quiet interval, whose shares are mostly noise, moves the shares little. The trend is the
slope of the mean, damped with the distance ahead (Gardner and McKenzie, 1985). Noise asks for a long memory and change
for a short one; several are kept, each with and without its trend, and `accuracy` says which has predicted best.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from omni_placement.load.windows import Counts

# Tokens/s left of a stream that has fallen silent.
FADED = 1e-6
# An interval this many times further from the shares than usual is a step: the past counts for less at once.
SURPRISE = 2.0
# Weight of the newest interval in what is usual.
USUAL = 0.05


class Method(NamedTuple):
    """One way to forecast: which memory, and whether its trend is carried on."""

    memory: int
    with_trend: bool


@dataclass(frozen=True, slots=True)
class Smoothing:
    """How fast the past is forgotten."""

    interval_s: float = 60.0
    """Reports are added up over so long; rates and errors are of whole intervals."""
    half_lives_s: tuple[float, ...] = (60.0, 300.0, 1500.0)
    """Ages at which counts weigh half, one for each memory. The middle one is used until errors are known."""
    trend_half_life_s: float = 1800.0
    """The trend is a difference of noisy levels and is smoothed over longer."""
    damping: float = 0.95
    """A forecast lets the trend keep this much per interval ahead, so that it ends instead of running away."""
    horizon_s: float = 300.0
    """Forecasts are judged over this horizon."""

    def keep(self, half_life_s: float) -> float:
        """What an interval leaves of a weight with this half-life."""
        return float(0.5 ** (self.interval_s / half_life_s))

    @property
    def horizon_intervals(self) -> int:
        return max(1, round(self.horizon_s / self.interval_s))

    @property
    def methods(self) -> list[Method]:
        return [Method(memory, trend) for memory in range(len(self.half_lives_s)) for trend in (False, True)]

    @property
    def first_method(self) -> Method:
        return Method(len(self.half_lives_s) // 2, False)


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """Tokens expected over `horizon_s`, float64 (layers, experts), and the standard deviation of each.

    `error` is what earlier forecasts missed by: half the sum of absolute differences between predicted and seen shares,
    averaged over layers and lately, in [0, 1]; None until a forecast's horizon has passed.
    """

    load: Counts
    spread: Counts
    horizon_s: float
    error: float | None

    @property
    def shares(self) -> Counts:
        return shares_of(self.load)


def shares_of(counts: Counts) -> Counts:
    """Rows scaled to sum 1; a row without counts is spread evenly."""
    totals = counts.sum(axis=1, keepdims=True)
    return np.where(totals > 0, counts / np.where(totals > 0, totals, 1.0), 1.0 / counts.shape[1])


def share_error(predicted: Counts, seen: Counts) -> float:
    """Total variation distance between two loads' shares, averaged over the layers that saw tokens."""
    active = seen.sum(axis=1) > 0
    if not active.any():
        return 0.0
    return float(0.5 * np.abs(shares_of(predicted) - shares_of(seen))[active].sum(axis=1).mean())


class Smoothed:
    """Exponentially weighted level of an array, and the smoothed slope of that level."""

    def __init__(self, value: Counts, smoothing: Smoothing, half_life_s: float) -> None:
        self.level, self.trend = value.copy(), np.zeros_like(value)
        self._keep = smoothing.keep(half_life_s)
        self._keep_trend = smoothing.keep(smoothing.trend_half_life_s)
        self._damping = smoothing.damping

    def update(self, value: Counts, weight: Counts | None = None) -> None:
        """Take the newest value, of the weight given or that of an even half-life."""
        change = (1.0 - self._keep if weight is None else weight) * (value - self.level)
        self.level = self.level + change
        self.trend = self._keep_trend * self.trend + (1.0 - self._keep_trend) * change

    def mean_ahead(self, intervals: int, with_trend: bool) -> Counts:
        """Mean of the forecasts for the next 1 to `intervals` intervals, none negative. A trend halves or doubles the
        level at most, so that a step that it takes for a slope does not carry far."""
        level = np.maximum(self.level, 0.0)
        if not with_trend:
            return level
        # A level follows a slope this many intervals late (Brown, 1959).
        lag = self._keep / (1.0 - self._keep)
        steps = lag + float(np.cumsum(self._damping ** np.arange(1, intervals + 1)).mean())
        ahead: Counts = np.clip(level + steps * self.trend, 0.5 * level, 2.0 * level)
        return ahead


class Memory:
    """Rate and shares of one stream with one half-life."""

    def __init__(self, shape: tuple[int, int], smoothing: Smoothing, half_life_s: float) -> None:
        self._keep = smoothing.keep(half_life_s)
        self._usual = 1.0
        self.rate = Smoothed(np.zeros(shape[0]), smoothing, half_life_s)
        self.shares = Smoothed(np.full(shape, 1.0 / shape[1]), smoothing, half_life_s)
        self.weight = np.zeros(shape[0])
        """Tokens the shares rest on, each counted with its weight, (layers,)."""

    def update(self, rate: Counts, seen: Counts, tokens: Counts, is_first: bool) -> None:
        """Take an interval: tokens/s and tokens of each layer, (layers,), and shares, (layers, experts)."""
        if is_first:
            self.rate.level = rate.copy()
        else:
            self.rate.update(rate)
        # What is first seen is a level; it says nothing of a trend.
        self.shares.level = np.where(((self.weight == 0) & (tokens > 0))[:, None], seen, self.shares.level)
        self.weight = self._keep * self._still_holds(seen, tokens) * self.weight + tokens
        gain = np.where(tokens > 0, tokens / np.where(self.weight > 0, self.weight, 1.0), 0.0)
        self.shares.update(seen, gain[:, None])

    def fade(self, intervals: int) -> None:
        """What `update` comes to over intervals without tokens; of trends nothing is left."""
        keep = self._keep**intervals
        self.rate.level, self.weight = self.rate.level * keep, self.weight * keep
        self.rate.trend, self.shares.trend = np.zeros_like(self.rate.trend), np.zeros_like(self.shares.trend)

    def _still_holds(self, seen: Counts, tokens: Counts) -> float:
        """Share of its weight that the past keeps: less than all where the shares have jumped, and back again after.

        Distances are counted in what sampling so many tokens makes, so that a quiet interval is no surprise. What is
        usual takes jumps in at their bound only, or one would hide the next.
        """
        if not tokens.any() or not self.weight.any():
            return 1.0
        level = np.clip(self.shares.level, 0.0, 1.0)
        noise = np.sqrt(2.0 / np.pi * level * (1.0 - level) / np.maximum(tokens, 1.0)[:, None])
        distance = float(np.abs(seen - level)[tokens > 0].sum() / max(noise[tokens > 0].sum(), 1e-12))
        usual = max(self._usual, 1.0)
        self._usual = usual + USUAL * (min(distance, SURPRISE * usual) - usual)
        return min(SURPRISE * usual / distance, 1.0) ** 2 if distance > 0 else 1.0


class StreamForecast:
    """All memories of one stream, fed with the counts of whole intervals."""

    def __init__(self, shape: tuple[int, int], smoothing: Smoothing) -> None:
        self._smoothing = smoothing
        self.memories: Sequence[Memory] = [Memory(shape, smoothing, each) for each in smoothing.half_lives_s]
        self._is_first = True
        self.is_known = False
        """Whether it has seen tokens, or was restored."""

    def update(self, counts: Counts) -> None:
        """Take the tokens of one interval, float64 (layers, experts)."""
        tokens = counts.sum(axis=1)
        seen = shares_of(counts)
        for memory in self.memories:
            memory.update(tokens / self._smoothing.interval_s, seen, tokens, self._is_first)
        self._is_first, self.is_known = False, self.is_known or bool(tokens.any())

    def fade(self, intervals: int) -> None:
        """Let so many intervals without tokens pass."""
        for memory in self.memories:
            memory.fade(intervals)

    def restore(self, rate: Counts, shares: Counts, weight: Counts) -> None:
        """Begin from a profile: known levels, no trend."""
        for memory in self.memories:
            memory.rate.level, memory.shares.level, memory.weight = rate.copy(), shares.copy(), weight.copy()
        self._is_first, self.is_known = False, True

    def ahead(self, intervals: int, method: Method) -> Counts:
        """Tokens expected over the next `intervals` intervals, (layers, experts), none negative."""
        memory = self.memories[method.memory]
        rate = memory.rate.mean_ahead(intervals, method.with_trend)
        if self.is_known:
            # After a silence nothing is to be gained, but which experts are popular is still known.
            rate = np.maximum(rate, FADED)
        shares = shares_of(memory.shares.mean_ahead(intervals, method.with_trend))
        tokens: Counts = (rate * intervals * self._smoothing.interval_s)[:, None] * shares
        return tokens

    def sampling_variance(self, method: Method) -> Counts:
        """Variance of the shares' level if tokens were routed independently, (layers, experts)."""
        memory = self.memories[method.memory]
        level = np.clip(memory.shares.level, 0.0, 1.0)
        variance: Counts = level * (1.0 - level) / np.maximum(memory.weight, 1.0)[:, None]
        return variance
