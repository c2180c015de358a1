"""Whether the load has left the one a layout was planned for, and whether it stays away.

Two questions, because they have two answers:

    is it more than noise?  per layer, the G statistic of two samples of counts, 2 N JSD in nats, where JSD is their
                            Jensen-Shannon divergence weighted by tokens (Lin, 1991). Without drift it follows a
                            chi-square distribution with (experts - 1) degrees of freedom; layers share one false alarm
                            rate (Bonferroni), which holds however they depend on each other.
    does it last?           a one-sided cumulative sum of the total variation distance beyond what noise explains
                            (Page, 1954). No single interval can add more than `burst`, so that a few of them,
                            however strong, do not raise the alarm.

Tokens of one request choose similar experts, so counts vary more than independent draws. The factor (dispersion) is
learned from neighbouring intervals and divides the statistic.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

import numpy as np

from omni_placement.load.forecast import shares_of
from omni_placement.load.windows import Counts

# Chi-square is no good approximation below so many expected counts; experts with fewer are taken together.
LEAST_COUNT = 5.0
DISPERSION_WEIGHT = 0.1


class DriftKind(StrEnum):
    NONE = "none"
    SLIGHT = "slight"
    """More than noise, and little."""
    BURST = "burst"
    """Far off; not known to last."""
    LASTING = "lasting"


@dataclass(frozen=True, slots=True)
class DriftRule:
    false_alarms: float = 1e-4
    """Chance that an interval without drift is called more than noise."""
    tolerance: float = 0.01
    """Total variation distance that is lived with."""
    burst: float = 0.05
    """Distance beyond noise that is far off; also the most that one interval adds to the sum."""
    alarm: float = 0.3
    """Sum at which drift lasts: with the defaults eight intervals far off, or 30 of 0.01 above tolerance."""


@dataclass(frozen=True, slots=True)
class Drift:
    """`distance`: total variation between planned and seen shares, mean over layers, in [0, 1]; `noise` is the part
    that sampling alone makes. `excess`: the largest layer's statistic over its threshold; above 1 it is no noise.
    `sum`: what has added up; `alarm` ends it."""

    kind: DriftKind
    distance: float
    noise: float
    excess: float
    sum: float


UNKNOWN = Drift(DriftKind.NONE, 0.0, 0.0, 0.0, 0.0)


class DriftDetector:
    """Compares each interval's counts with the load that the layout in force was planned for."""

    def __init__(self, rule: DriftRule) -> None:
        self._rule = rule
        self._planned: Counts | None = None
        self._before: Counts | None = None
        self._sum = 0.0
        self.dispersion = 1.0
        self.latest = UNKNOWN

    def planned(self, counts: Counts) -> None:
        """A layout was planned for this load; `counts` are the tokens the knowledge rests on, (layers, experts)."""
        self._planned, self._sum, self.latest = counts, 0.0, UNKNOWN

    def observe(self, counts: Counts) -> Drift:
        """Judge an interval. One without tokens, or without a planned load, leaves the last judgement."""
        if not counts.any():
            return self.latest
        if self._before is not None:
            self._learn_dispersion(self._before, counts)
        self._before = counts
        if self._planned is not None:
            self.latest = self._judge(self._planned, counts)
        return self.latest

    def _judge(self, planned: Counts, counts: Counts) -> Drift:
        g, freedom = g_statistic(planned, counts)
        layers = np.flatnonzero(freedom > 0)
        rate = self._rule.false_alarms / max(len(layers), 1)
        excess = max(
            (g[layer] / self.dispersion / chi_square_threshold(int(freedom[layer]), rate) for layer in layers),
            default=0.0,
        )
        distance, noise = _distance(planned, counts, self.dispersion)
        beyond = distance - noise
        step = min(beyond, self._rule.burst) - self._rule.tolerance
        # What noise explains may lower the sum, never raise it.
        self._sum = max(0.0, self._sum + (step if excess > 1 else min(step, 0.0)))
        return Drift(self._kind(float(excess), beyond), distance, noise, float(excess), self._sum)

    def _kind(self, excess: float, beyond: float) -> DriftKind:
        if self._sum >= self._rule.alarm:
            return DriftKind.LASTING
        if excess <= 1:
            return DriftKind.NONE
        return DriftKind.BURST if beyond >= self._rule.burst else DriftKind.SLIGHT

    def _learn_dispersion(self, before: Counts, counts: Counts) -> None:
        g, freedom = g_statistic(before, counts)
        if not (freedom > 0).any():
            return
        # The median over layers, so that one changed layer does not widen the noise of all.
        ratio = float(np.median(g[freedom > 0] / freedom[freedom > 0]))
        self.dispersion = max(1.0, self.dispersion + DISPERSION_WEIGHT * (ratio - self.dispersion))


def g_statistic(first: Counts, second: Counts) -> tuple[Counts, Counts]:
    """G of two samples of counts, and its degrees of freedom, per layer; both 0 where a sample has no tokens."""
    n1, n2 = first.sum(axis=1, keepdims=True), second.sum(axis=1, keepdims=True)
    total = np.where(n1 + n2 > 0, n1 + n2, 1.0)
    pooled = (first + second) / total
    is_rare = pooled * np.minimum(n1, n2) < LEAST_COUNT
    first, second = _with_rare_together(first, is_rare), _with_rare_together(second, is_rare)
    pooled = (first + second) / total
    g = 2.0 * (_divergence(first, pooled * n1) + _divergence(second, pooled * n2))
    freedom = np.maximum((pooled > 0).sum(axis=1) - 1, 0)
    counted = (n1[:, 0] > 0) & (n2[:, 0] > 0)
    return np.where(counted, np.maximum(g, 0.0), 0.0), np.where(counted, freedom, 0)


def _with_rare_together(counts: Counts, is_rare: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> Counts:
    rare = np.where(is_rare, counts, 0.0).sum(axis=1, keepdims=True)
    return np.concatenate([np.where(is_rare, 0.0, counts), rare], axis=1)


def _divergence(counts: Counts, expected: Counts) -> Counts:
    ratio = np.divide(counts, expected, out=np.ones_like(counts), where=(counts > 0) & (expected > 0))
    total: Counts = (counts * np.log(ratio)).sum(axis=1)
    return total


def chi_square_threshold(freedom: int, chance: float) -> float:
    """Value that a chi-square variable exceeds with this chance (Wilson and Hilferty, 1931; within 1% from 3 on)."""
    if not 0 < chance < 1:
        raise ValueError(f"{chance} is not a probability")
    z = NormalDist().inv_cdf(1.0 - chance)
    return freedom * max(1.0 - 2.0 / (9.0 * freedom) + z * math.sqrt(2.0 / (9.0 * freedom)), 0.0) ** 3


def _distance(planned: Counts, counts: Counts, dispersion: float) -> tuple[float, float]:
    """Total variation of shares, and what two samples of that size differ by on average, over layers with tokens."""
    n1, n2 = planned.sum(axis=1, keepdims=True), counts.sum(axis=1, keepdims=True)
    active = ((n1 > 0) & (n2 > 0))[:, 0]
    if not active.any():
        return 0.0, 0.0
    p, q = shares_of(planned), shares_of(counts)
    pooled = (planned + counts) / np.maximum(n1 + n2, 1.0)
    variance = dispersion * pooled * (1.0 - pooled) * (1.0 / np.maximum(n1, 1.0) + 1.0 / np.maximum(n2, 1.0))
    # Mean of |x| for a normal variable of that variance.
    noise = 0.5 * np.sqrt(2.0 / math.pi * variance).sum(axis=1)
    return float(0.5 * np.abs(p - q)[active].sum(axis=1).mean()), float(noise[active].mean())
