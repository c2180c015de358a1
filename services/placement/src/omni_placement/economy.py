"""Whether a planned layout is worth its migration, and for which layers.

Everything is in ms of step time over the forecast's horizon, which is what ms per step times steps per second times the
horizon comes to:

    gain of a layer   tokens fewer on its slowest rank x ms per token
    risk              how much less it is on average over loads drawn from the forecast's error, and `risk` standard
                      deviations of it: a layout fitted to a forecast looks better on it than it will be
    cost              rounds x (bytes of one expert / bandwidth of a rank x exposed share + stall at the step boundary)

Layers move independently, so the ones whose gain per moved byte is best are taken, as many as pay. A layout is
published when gain - risk exceeds (1 + hysteresis) x cost and a least share of the step time.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from omni_placement.layout import Layout
from omni_placement.load.drift import Drift, DriftKind
from omni_placement.load.forecast import Forecast

Terms = npt.NDArray[np.float64]

DRAWS = 16


@dataclass(frozen=True, slots=True)
class Costs:
    """What tokens and moves take. `ms_per_token` comes from reports (`LoadBook.ms_per_token`) or is configured."""

    ms_per_token: float
    """Step time per token on the slowest rank of a layer."""
    bandwidth_bytes_per_s: float = 25e9
    """Of one rank, sending and receiving at once."""
    stall_ms_per_round: float = 1.0
    """Steps wait so long at the boundary where a round's weights come into use."""
    exposed: float = 1.0
    """Share of a transfer's time by which steps take longer meanwhile; 1 where serving stops for it."""

    def migration_ms(self, rounds: int, expert_bytes: int) -> float:
        transfer_ms = 1000.0 * expert_bytes / self.bandwidth_bytes_per_s * self.exposed
        return rounds * (transfer_ms + self.stall_ms_per_round)


@dataclass(frozen=True, slots=True)
class Rule:
    """When a gain is enough."""

    hysteresis: float = 4.0
    """The gain must exceed the cost by so many times the cost. Load that drifts on takes part of a gain back before the
    horizon ends; at 4 a simulated day took least time (bench/placement_day.py)."""
    least_gain: float = 0.001
    """And be this share of the time on slowest ranks, so that noise does not move weights where moving is cheap."""
    risk: float = 0.0
    """Standard deviations of a layer's gain, as the forecast's error makes it vary, held against its mean."""
    min_interval_s: float = 60.0
    waits_out_bursts: bool = False
    """Nothing moves while the load is off its course and it is not known that it will stay. Worth it where a migration
    takes as long as a burst."""


class Reason(StrEnum):
    PAYS = "pays"
    SAME = "same_layout"
    TOO_SOON = "min_interval"
    BURST = "burst"
    NO_GAIN = "no_gain"
    """No layer gains, the forecast's error considered."""
    COSTS_MORE = "costs_more"
    """Some layers gain, none enough for its migration."""
    TOO_LITTLE = "least_gain"


@dataclass(frozen=True, slots=True)
class Decision:
    """`layout` is what to publish: the target in `layers`, the layout in force elsewhere; that itself if not `publish`.

    Terms are of `layers`, over the horizon; where nothing is published, of the best choice there was: the layers whose
    gain comes nearest to paying, all that differ where none gains.
    `current_ms` is the time on slowest ranks of all layers under the layout in force.
    """

    publish: bool
    reason: Reason
    layout: Layout
    layers: tuple[int, ...]
    gain_ms: float
    risk_ms: float
    cost_ms: float
    current_ms: float
    moved_bytes: int
    rounds: int
    ms_per_token: float


@dataclass(frozen=True, slots=True, eq=False)
class _Changes:
    """What each layer gains and asks for."""

    current_ms: float
    """Of all layers, under the layout in force."""
    gain_ms: Terms
    risk_ms: Terms
    arrivals: Terms
    """Experts that reach each rank, (layers, ranks)."""
    sends: Terms
    """Experts that each rank must send, because it alone holds them, (layers, ranks)."""
    differs: npt.NDArray[np.bool_]

    def rounds(self, order: npt.NDArray[np.intp]) -> Terms:
        """Rounds that the first, the first two, ... of these layers take together; no schedule takes fewer."""
        busiest = np.maximum(self.arrivals[order].cumsum(axis=0), self.sends[order].cumsum(axis=0)).max(axis=1)
        rounds: Terms = np.maximum(busiest, 1.0)
        return rounds


def decide(
    current: Layout,
    target: Layout,
    forecast: Forecast,
    costs: Costs,
    rule: Rule,
    *,
    since_published_s: float,
    drift: Drift | None = None,
    budget: int | None = None,
) -> Decision:
    """Choose layers of `target` to publish in place of `current`, or none. Both are of one topology.

    `since_published_s` is the age of the layout in force; `budget` bounds the copies beyond one per expert, as it did
    for `target`. What must not wait for a gain (a failed rank, pins) is no question for this function.
    """
    changes = _changes(current, target, forecast, costs, rule.risk)
    order, pays = _chosen(current, target, changes, costs, rule, budget)
    layout = _mixed(current, target, order)
    gain_ms = float(changes.gain_ms[order].sum())
    cautious = gain_ms - float(changes.risk_ms[order].sum())
    rounds = int(changes.rounds(order)[-1]) if len(order) else 0
    cost_ms = costs.migration_ms(rounds, current.topology.expert_bytes)
    is_burst = rule.waits_out_bursts and drift is not None and drift.kind is DriftKind.BURST
    reason = _reason(changes, cautious if pays else None, rule, since_published_s, is_burst)
    publish = reason is Reason.PAYS
    return Decision(
        publish=publish,
        reason=reason,
        layout=layout if publish else current,
        layers=tuple(sorted(order.tolist())),
        gain_ms=gain_ms,
        risk_ms=float(changes.risk_ms[order].sum()),
        cost_ms=cost_ms,
        current_ms=changes.current_ms,
        moved_bytes=int(changes.arrivals[order].sum()) * current.topology.expert_bytes,
        rounds=rounds,
        ms_per_token=costs.ms_per_token,
    )


def _reason(
    changes: _Changes, cautious_ms: float | None, rule: Rule, since_published_s: float, is_burst: bool
) -> Reason:
    """`cautious_ms` is the gain less risk of the layers chosen, None where none pays."""
    if not changes.differs.any():
        return Reason.SAME
    if since_published_s < rule.min_interval_s:
        return Reason.TOO_SOON
    if is_burst:
        return Reason.BURST
    if cautious_ms is None:
        return Reason.COSTS_MORE if (changes.gain_ms - changes.risk_ms > 0).any() else Reason.NO_GAIN
    return Reason.PAYS if cautious_ms > rule.least_gain * changes.current_ms else Reason.TOO_LITTLE


def _changes(current: Layout, target: Layout, forecast: Forecast, costs: Costs, risk: float) -> _Changes:
    before, after = (_slowest(layout, forecast.load[None])[0] for layout in (current, target))
    gain_ms = costs.ms_per_token * (before - after)
    draws = _draws(forecast)
    drawn = costs.ms_per_token * (_slowest(current, draws) - _slowest(target, draws))
    cautious = np.minimum(drawn.mean(axis=0) - risk * drawn.std(axis=0), gain_ms)
    arriving = (target.indicator == 1) & (current.indicator == 0)
    is_alone = (current.indicator == 1) & (current.replicas == 1)
    return _Changes(
        current_ms=costs.ms_per_token * float(before.sum()),
        gain_ms=gain_ms,
        risk_ms=gain_ms - cautious,
        arrivals=arriving.sum(axis=2).T.astype(np.float64),
        sends=(is_alone & arriving.any(axis=0)).sum(axis=2).T.astype(np.float64),
        differs=(target.indicator != current.indicator).any(axis=(0, 2)),
    )


def _draws(forecast: Forecast) -> Terms:
    """Loads that may come instead of the one expected, (draws, layers, experts); the same for the same forecast."""
    if not forecast.spread.any():
        return forecast.load[None]
    off = np.random.default_rng(0).standard_normal((DRAWS, *forecast.load.shape))
    loads: Terms = np.maximum(forecast.load + forecast.spread * off, 0.0)
    return loads


def _slowest(layout: Layout, loads: Terms) -> Terms:
    """Tokens of the slowest rank of each layer, (draws, layers), for loads (draws, layers, experts)."""
    shape = layout.topology
    # A last expert without load stands for empty slots, whose index is -1.
    share = np.pad(loads / layout.replicas, ((0, 0), (0, 0), (0, 1)))
    slots = np.take_along_axis(share, layout.physical.reshape(1, shape.num_layers, -1), axis=2)
    slowest: Terms = slots.reshape(-1, *shape.shape).sum(axis=3).max(axis=2)
    return slowest


def _chosen(
    current: Layout, target: Layout, changes: _Changes, costs: Costs, rule: Rule, budget: int | None
) -> tuple[npt.NDArray[np.intp], bool]:
    """The layers whose gain exceeds their cost by most together, best gain per move first, and whether it does; all
    that differ where none gains."""
    cautious = changes.gain_ms - changes.risk_ms
    moves = np.maximum(changes.arrivals.sum(axis=1), 1.0)
    order = np.argsort(-cautious / moves, kind="stable")
    order = order[(cautious[order] > 0) & changes.differs[order]]
    extra = (target.replicas.sum(axis=1) - current.replicas.sum(axis=1)).astype(np.int64)
    if budget is not None:
        room = budget - int((current.replicas - 1).sum())
        # Layers that give copies up come first; then the others as far as the budget goes.
        order = order[np.argsort(extra[order] > 0, kind="stable")]
        order = order[np.cumsum(extra[order]) <= room]
    if not len(order):
        return np.flatnonzero(changes.differs), False
    per_round_ms = costs.migration_ms(1, current.topology.expert_bytes)
    surplus = cautious[order].cumsum() - (1.0 + rule.hysteresis) * per_round_ms * changes.rounds(order)
    best = int(np.argmax(surplus))
    return order[: best + 1], bool(surplus[best] > 0)


def _mixed(current: Layout, target: Layout, layers: npt.NDArray[np.intp]) -> Layout:
    physical = current.physical.copy()
    physical[layers] = target.physical[layers]
    return Layout(current.topology, physical)
