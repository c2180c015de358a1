"""One system through the day: what its steps wait for, and what its moves take."""

from dataclasses import dataclass, field

import numpy as np

from omni_placement.economy import Costs
from omni_placement.layout import Layout, Topology
from omni_placement.migration import fewest_rounds, moved_bytes
from omni_placement.problem import Problem
from omni_placement.solvers import SOLVERS
from placementday.systems import Oracle, Service, System
from placementday.traffic import Counts, Day, ticks


@dataclass
class Outcome:
    """Times in ms over the day. `expert_ms` is what steps wait for slowest ranks, `even_ms` what even ranks would take.

    `imbalance` is slowest rank over mean rank, sums over layers and steps, one figure per tick.
    """

    expert_ms: float = 0.0
    even_ms: float = 0.0
    migration_ms: float = 0.0
    moved_bytes: int = 0
    rounds: int = 0
    publications: int = 0
    plans: int = 0
    plan_ms: float = 0.0
    imbalance: list[float] = field(default_factory=list)
    moved_by_tick: list[int] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    layers_moved: int = 0

    @property
    def total_ms(self) -> float:
        return self.expert_ms + self.migration_ms


def start_layout(topology: Topology) -> Layout:
    """What every system begins with: experts in order, spare slots empty."""
    return SOLVERS["identity"](Problem(topology, np.ones((topology.num_layers, topology.num_experts))))


def replay(day: Day, topology: Topology, system: System, costs: Costs) -> Outcome:
    """The day under one system. Migrations are charged alike to all, but to an oracle."""
    outcome, current = Outcome(), start_layout(topology)
    share = _share(current)
    for index, tick in enumerate(ticks(day)):
        if isinstance(system, Oracle) and index % system.period == 0:
            current = system.before(tick, current)
            share = _share(current)
        ranks = np.matmul(tick.steps.transpose(1, 0, 2), share)
        mean = tick.steps.sum(axis=2) / topology.num_ranks
        peak = ranks.max(axis=2).T
        ms = costs.ms_per_token * day.steps_per_tick / day.samples
        outcome.expert_ms += ms * float(peak.sum())
        outcome.even_ms += ms * float(mean.sum())
        outcome.imbalance.append(float(peak.sum() / mean.sum()))
        following = system.after(index, tick, current)
        outcome.moved_by_tick.append(0 if following is None else moved_bytes(current, following))
        if following is not None:
            _charge(outcome, current, following, costs)
            current, share = following, _share(following)
    outcome.plans, outcome.plan_ms = len(system.plan_s), 1000 * float(np.mean(system.plan_s or [0.0]))
    if isinstance(system, Service):
        for decision in system.decisions:
            outcome.reasons[decision.reason.value] = outcome.reasons.get(decision.reason.value, 0) + 1
            outcome.layers_moved += len(decision.layers) if decision.publish else 0
    return outcome


def _charge(outcome: Outcome, current: Layout, following: Layout, costs: Costs) -> None:
    rounds = fewest_rounds(current, following)
    outcome.rounds += rounds
    outcome.migration_ms += costs.migration_ms(rounds, current.topology.expert_bytes)
    outcome.moved_bytes += moved_bytes(current, following)
    outcome.publications += 1


def _share(layout: Layout) -> Counts:
    """Part of an expert's tokens that each rank computes: (layers, experts, ranks)."""
    share: Counts = (layout.indicator / layout.replicas).transpose(1, 2, 0)
    return np.ascontiguousarray(share)
