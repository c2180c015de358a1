"""The default solver, `omni`."""

import numpy as np
import numpy.typing as npt

from omni_placement.layout import Layout
from omni_placement.problem import Loads, Problem
from omni_placement.solving.hosts import gathered
from omni_placement.solving.layer import Layer
from omni_placement.solving.levels import Levels
from omni_placement.solving.rematch import near
from omni_placement.solving.replicas import LayerPlan, share_budget


def omni(problem: Problem) -> Layout:
    """The layout with the shortest step found, near the layout in force where there is one.

    Each layer is planned for rising numbers of copies (`levels`), the budget goes to the layers whose step it shortens
    most (`replicas`), groups are brought together on hosts (`hosts`), and what is in force stays where it can
    (`rematch`). With `spread`, an expert whose load is less sure gets its further copy earlier, and less company on its
    ranks (`_cautious`).
    """
    load = _cautious(problem)
    capacity = problem.capacity
    layers = [
        Layer(row, capacity, pins, problem.replica_limit, problem.topology.slots_per_rank)
        for row, pins in zip(load, _pinned(problem), strict=True)
    ]
    levels = [Levels(layer) for layer in layers]
    if problem.budget is None:
        plans = [level.fullest() for level in levels]
    else:
        plans = share_budget([level.frontier() for level in levels], problem.extra_replicas)
    if problem.topology.num_groups > 1 and problem.topology.hosts[-1] > 0:
        plans = [gathered(problem.topology, *parts) for parts in zip(layers, plans, strict=True)]
    held = [plan.held for plan in plans]
    if problem.current is not None:
        allowed = _allowed(plans, problem.current, problem.extra_replicas)
        old = problem.current.physical
        held = [near(problem.topology, *parts) for parts in zip(layers, plans, old, allowed, strict=True)]
    return Layout(problem.topology, np.stack(held))


def _cautious(problem: Problem) -> Loads:
    """Load + sqrt(2 ln R / S) x spread, for R ranks of S copies.

    What a step waits for is the slowest of R ranks. If errors are independent, a rank's load is off by the root of its
    copies' squared spreads, which is their sum over sqrt(S) where they are alike; and the largest of R such errors is
    expected near sqrt(2 ln R) times that. So the sum over a rank of this load is about where its slowest moment lies.
    """
    if problem.spread is None:
        return problem.load.copy()
    ranks = int(np.count_nonzero(problem.capacity))
    copies = problem.topology.num_experts + problem.extra_replicas / problem.topology.num_layers
    return problem.load + problem.spread * float(np.sqrt(2 * np.log(ranks) * ranks / copies))


def _pinned(problem: Problem) -> list[npt.NDArray[np.bool_]]:
    """Of each layer, (ranks, experts); layers without pins share one array."""
    none = np.zeros((problem.topology.num_ranks, problem.topology.num_experts), dtype=np.bool_)
    pinned = [none] * problem.topology.num_layers
    for layer, expert, rank in problem.pinned:
        if pinned[layer] is none:
            pinned[layer] = none.copy()
        pinned[layer][rank, expert] = True
    return pinned


def _allowed(plans: list[LayerPlan], current: Layout, budget: int) -> list[int]:
    """Extra copies that each layer may have beside its plan's: as many as it has now, as far as the budget goes, since
    a copy that is there costs nothing."""
    left = budget - sum(plan.extra for plan in plans)
    allowed = []
    for plan, copies in zip(plans, current.replicas.sum(axis=1).tolist(), strict=True):
        more = min(max(copies - current.topology.num_experts - plan.extra, 0), left)
        allowed.append(plan.extra + more)
        left -= more
    return allowed
