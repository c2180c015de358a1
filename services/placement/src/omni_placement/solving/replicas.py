"""How many copies each expert gets: inside a layer by the largest share, between layers by marginal gain."""

# mypy: disable-error-code="assignment,arg-type,no-any-return"
# Scalars are annotated `int` and `float`; to mypy, what comes out of an array is something else.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from omni_common.compiled import kernel
from omni_placement.layout import Numbers, Slots
from omni_placement.problem import Loads


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """`held` (ranks, slots) of one layer, with at most `extra` copies beyond one per expert; `height` is the slowest
    rank's load."""

    height: float
    extra: int
    held: Slots


class _Edge(NamedTuple):
    """Of a layer's convex hull, up to plan number `end` of its frontier."""

    layer: int
    end: int
    gain_per_copy: float


@kernel
def give_copies(load: Loads, least: Numbers, limit: int, count: int) -> tuple[Numbers, Loads]:
    """Experts in the order in which `count` further copies of a layer are given out, each to the largest share, and
    that share after 0, 1, ... `count` of them.

    Of all ways to give out the first k, this makes the largest share load / copies smallest, for every k: whoever has
    the largest share must get a copy before it can fall. `least` is (experts,) the copies there are already. An expert
    with `limit` copies gets none; there are enough others.
    """
    copies = least.copy()
    share = load / copies
    order, largest = np.empty(count, dtype=np.int64), np.empty(count + 1)
    full = 0.0
    for expert in range(len(load)):
        if copies[expert] >= limit:
            full = max(full, share[expert])
            share[expert] = -1.0
    for index in range(count):
        expert = np.argmax(share)
        order[index] = expert
        largest[index] = max(full, share[expert])
        copies[expert] += 1
        share[expert] = load[expert] / copies[expert]
        if copies[expert] >= limit:
            full = max(full, share[expert])
            share[expert] = -1.0
    largest[count] = max(full, share.max())
    return order, largest


def share_budget(frontiers: Sequence[Sequence[LayerPlan]], budget: int) -> list[LayerPlan]:
    """One plan of each layer's frontier, with at most `budget` extra copies in all.

    Copies go where the step gets shorter by the most per copy. Each frontier is cut to its lower convex hull, whose
    edges fall in gain per copy, so that taking edges of all layers in falling order is optimal for every budget that
    they use up exactly; what is left before the first edge that is too long goes to the best plan within that edge.
    A larger budget takes the same edges and more, so the step never gets longer by it.
    """
    chosen = [frontier[0] for frontier in frontiers]
    left = budget - sum(plan.extra for plan in chosen)
    edges = [edge for layer, frontier in enumerate(frontiers) for edge in _hull_edges(layer, frontier)]
    for edge in sorted(edges, key=lambda edge: (-edge.gain_per_copy, edge.layer, edge.end)):
        first = chosen[edge.layer].extra
        within = [plan for plan in frontiers[edge.layer][: edge.end + 1] if plan.extra - first <= left]
        chosen[edge.layer] = within[-1]
        left -= within[-1].extra - first
        if within[-1] is not frontiers[edge.layer][edge.end]:
            break
    return chosen


def _hull_edges(layer: int, frontier: Sequence[LayerPlan]) -> list[_Edge]:
    edges, start = [], 0
    while start + 1 < len(frontier):
        gains = [
            (frontier[start].height - plan.height) / (plan.extra - frontier[start].extra)
            for plan in frontier[start + 1 :]
        ]
        start += 1 + int(np.argmax(gains))
        edges.append(_Edge(layer, start, max(gains)))
    return edges
