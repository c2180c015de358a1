"""Expert load of a day: classes of traffic with a daily course each, slow drift, bursts, and one sudden change.

An expert's share in a layer is lognormal: a part that all classes have in common, one that belongs to each class, and
one of each class that drifts (a stationary first-order process that forgets over `drift_hours`), as topics come and go.
The router is not modelled beyond that.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.float64]

TICK_S = 30.0
TICKS = int(24 * 3600 / TICK_S)


@dataclass(frozen=True, slots=True)
class TrafficClass:
    """`night` and `day` are shares of the group's capacity; a day's course peaks at `peak_hour`, `width_hours` wide."""

    name: str
    night: float
    day: float
    peak_hour: float
    width_hours: float
    since_hour: float = 0.0
    """The class begins all at once."""


CLASSES = (
    TrafficClass("chat", 0.10, 0.35, 20.0, 4.0),
    TrafficClass("code", 0.03, 0.35, 11.0, 3.0),
    TrafficClass("documents", 0.05, 0.15, 15.0, 4.0),
    TrafficClass("batch", 0.02, 0.25, 3.0, 2.5),
    TrafficClass("agents", 0.25, 0.25, 0.0, 6.0, since_hour=14.0),
)


@dataclass(frozen=True, slots=True)
class Day:
    """What the day is made of. Tokens of a step are those routed to experts, in one layer, over the whole group."""

    num_layers: int = 58
    num_experts: int = 256
    tokens_per_step: float = 16384.0
    """At full load: 64 sequences on each of 32 ranks, 8 experts each."""
    steps_per_s: float = 20.0
    common: float = 0.5
    """Standard deviations of log popularity: what classes share, what each has for good, and what drifts."""
    own: float = 0.7
    drift: float = 0.4
    drift_hours: float = 6.0
    bursts: int = 10
    burst_share: float = 0.5
    """Tokens of a burst, of those that are there anyway; its experts are as skewed as a class's."""
    clustering: float = 0.05
    """Relative standard deviation of an expert's count beyond sampling, because sequences stay for many steps."""
    samples: int = 2
    """Single steps drawn per tick; each system's slowest ranks are those of single steps, not of means."""
    seed: int = 1

    @property
    def steps_per_tick(self) -> int:
        return round(self.steps_per_s * TICK_S)


@dataclass(frozen=True, slots=True)
class Tick:
    """`counts` are the tokens of all steps, by class (layers, experts); `steps` single ones, (samples, ...)."""

    hour: float
    counts: dict[str, Counts]
    steps: Counts
    mean: Counts
    """Tokens expected in one step."""


def rate(kind: TrafficClass, hour: float) -> float:
    """Share of the group's capacity."""
    if hour < kind.since_hour:
        return 0.0
    away = min(abs(hour - kind.peak_hour), 24 - abs(hour - kind.peak_hour))
    return kind.night + (kind.day - kind.night) * float(np.exp(-0.5 * (away / kind.width_hours) ** 2))


def ticks(day: Day) -> Iterator[Tick]:
    """The day, tick by tick. A seed gives the same day again."""
    random = np.random.default_rng(day.seed)
    shape = day.num_layers, day.num_experts
    common = day.common * random.standard_normal(shape)
    own = {kind.name: day.own * random.standard_normal(shape) for kind in CLASSES}
    drifting = {kind.name: day.drift * random.standard_normal(shape) for kind in CLASSES}
    bursts = [
        (start, start + int(random.integers(4, 17)), day.own * random.standard_normal(shape))
        for start in sorted(random.choice(TICKS, day.bursts, replace=False).tolist())
    ]
    keep = float(np.exp(-TICK_S / 3600 / day.drift_hours))
    for index in range(TICKS):
        hour = index * TICK_S / 3600
        means = {}
        for kind in CLASSES:
            drifting[kind.name] *= keep
            drifting[kind.name] += day.drift * np.sqrt(1 - keep**2) * random.standard_normal(shape)
            if (tokens := rate(kind, hour) * day.tokens_per_step) > 0:
                means[kind.name] = tokens * _shares(common + own[kind.name] + drifting[kind.name])
        there = sum(float(mean.sum()) for mean in means.values()) / day.num_layers
        for number, (start, end, popularity) in enumerate(bursts):
            if start <= index < end:
                means[f"burst {number}"] = day.burst_share * there * _shares(common + popularity)
        yield _drawn(day, hour, means, random)


def _drawn(day: Day, hour: float, means: dict[str, Counts], random: np.random.Generator) -> Tick:
    spread = {
        name: mean * np.maximum(1 + day.clustering * random.standard_normal(mean.shape), 0.0)
        for name, mean in means.items()
    }
    counts = {name: random.poisson(mean * day.steps_per_tick).astype(np.float64) for name, mean in spread.items()}
    mean = np.sum(list(spread.values()), axis=0)
    steps = random.poisson(mean, (day.samples, *mean.shape)).astype(np.float64)
    return Tick(hour, counts, steps, mean)


def _shares(popularity: Counts) -> Counts:
    weight = np.exp(popularity)
    shares: Counts = weight / weight.sum(axis=1, keepdims=True)
    return shares
