"""How short a step can be at best: a proven lower bound on each layer's slowest rank."""

import numpy as np

from omni_common.compiled import kernel
from omni_placement.layout import Numbers
from omni_placement.problem import Loads, Problem
from omni_placement.solving.replicas import give_copies

_PROBES = 14
"""Heights tried per layer; the last factor between two of them is far below a thousandth."""
_SMALL = np.linspace(0.04, 0.5, 24)
"""What counts as a small copy, relative to the height tried."""
_PRICES = np.concatenate([[0.0], np.geomspace(0.02, 4.0, 16)])
"""Prices of a copy, in ranks."""
_EXACT = 1e-9
"""Ties count in favour of a plan, so that rounding cannot lift the bound."""


def lower_bound(problem: Problem) -> Loads:
    """float64 (layers,): no layout that solves the problem has a lower slowest rank. Pins are not considered.

    Let R ranks be usable, S slots on the largest, and at most n copies be held in a layer. The bound is the largest of:

    Mean. The slowest of R ranks has at least the mean load.

    Share. The slowest rank has at least the largest share, load / copies, and giving each copy to whoever has the
    largest share makes that smallest (`replicas`).

    Crowd. Take the h busiest experts. Others have at least one copy each, so these have at most n - (E - h), and lie on
    some q <= min(R, n - (E - h)) ranks. The other R - q ranks have room for at most m copies of the rest, whose load is
    at most that of the m busiest of them, split or not. All else is on the q ranks, and the slowest has a q-th of it.

    Fit. Suppose a layout has no rank above T. Call a copy big above T - s, small up to s, and middling between, where
    s <= T / 2. A rank with a big copy has no other big or middling one; a rank without has at most
    M = min(S, ceil(T / s) - 1) middling ones. So with 1 for a big copy and 1 / M for a middling one, the copies of a
    layer sum up to at most R.
    Each expert has some number of copies c >= load / T; for any price p >= 0, the sum over experts of the least of
    c x weight(load / c) + p x c is then at most R + p x n. Only the fewest copies that are not too high, not big, and
    small matter. Where some s and p show a larger sum, no such layout exists and T is a bound; T is sought by halving.
    """
    capacity = np.sort(problem.capacity[problem.capacity > 0])[::-1]
    experts, limit = problem.topology.num_experts, problem.replica_limit
    most = min(int(capacity.sum()), experts * limit) - experts
    extra = min(most, most if problem.budget is None else problem.budget)
    one_each = np.ones(experts, dtype=np.int64)
    bounds = np.zeros(problem.topology.num_layers)
    for layer, load in enumerate(problem.load.copy()):
        if load.any():
            share = float(give_copies(load, one_each, limit, extra)[1][-1])
            bound = max(float(load.sum()) / len(capacity), share, _crowd(np.sort(load)[::-1], capacity, extra))
            bounds[layer] = _fit(load, len(capacity), int(capacity[0]), experts + extra, limit, bound)
    return bounds


def _crowd(load: Loads, capacity: Numbers, extra: int) -> float:
    """`load` and `capacity` in falling order."""
    experts, ranks = len(load), len(capacity)
    upto = np.concatenate([[0.0], np.cumsum(load)])
    room = np.concatenate([[0], np.cumsum(capacity)])
    on = np.arange(1, ranks + 1)[None, :]
    busiest = np.arange(1, experts + 1)[:, None]
    elsewhere = np.minimum(busiest + room[ranks - on], experts)
    here = (upto[-1] - (upto[elsewhere] - upto[busiest])) / on
    return float(np.where(on <= extra + busiest, here, np.inf).min(axis=1).max())


@kernel
def _fit(load: Loads, ranks: int, slots: int, copies: int, limit: int, bound: float) -> float:
    low, high, small = bound, bound * 2, 0
    for _ in range(_PROBES):
        height = (low + high) / 2
        for offset in range(len(_SMALL)):
            chosen = (small + offset) % len(_SMALL)
            if _cannot(load, ranks, slots, copies, limit, height, height * _SMALL[chosen]):
                small = chosen
                break
        else:
            high = height
            continue
        low = height
    return low


@kernel
def _cannot(load: Loads, ranks: int, slots: int, copies: int, limit: int, height: float, small: float) -> bool:
    """Whether the Fit argument rules out a layout of this height."""
    middling = 1.0 / max(min(slots, int(np.ceil(height / small - _EXACT)) - 1), 1)
    counts, weights = np.empty((len(load), 3)), np.empty((len(load), 3))
    for expert in range(len(load)):
        for index, size in enumerate((height, height - small, small)):
            count = max(np.ceil(load[expert] / size - _EXACT), 1.0)
            share = load[expert] / count * (1.0 - _EXACT)
            weight = 1.0 if share > height - small else middling if share > small else 0.0
            counts[expert, index] = count
            weights[expert, index] = count * weight if count <= limit else np.inf
    for price in _PRICES:
        total = 0.0
        for expert in range(len(load)):
            total += min(
                weights[expert, 0] + price * counts[expert, 0],
                weights[expert, 1] + price * counts[expert, 1],
                weights[expert, 2] + price * counts[expert, 2],
            )
        if total > (ranks + price * copies) * (1.0 + _EXACT):
            return True
    return False
