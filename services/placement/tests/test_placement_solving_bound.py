"""The lower bound against optimal layouts, found by trying all."""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_placement.layout import Topology
from omni_placement.problem import Problem
from omni_placement.solving import lower_bound, omni

Loads = npt.NDArray[np.float64]


def optimum(problem: Problem) -> float:
    """The least slowest rank of a problem of one layer."""
    best = np.inf
    load, capacity = problem.load[0], problem.capacity
    for copies in _copies(problem):
        best = min(best, _packed(load / copies, copies, capacity, best))
    return float(best)


def _copies(problem: Problem) -> Iterator[npt.NDArray[np.int64]]:
    most = problem.topology.num_experts + problem.extra_replicas

    def further(given: list[int], left: int) -> Iterator[list[int]]:
        missing = problem.topology.num_experts - len(given)
        if not missing:
            yield given
            return
        for count in range(1, min(problem.replica_limit, left - missing + 1) + 1):
            yield from further([*given, count], left - count)

    return (np.array(counts) for counts in further([], most))


def _packed(share: Loads, copies: npt.NDArray[np.int64], capacity: npt.NDArray[np.int64], best: float) -> float:
    order = np.argsort(-share)

    def further(index: int, loads: tuple[float, ...], free: tuple[int, ...]) -> float:
        nonlocal best
        if max(loads) >= best:
            return np.inf
        if index == len(order):
            best = max(loads)
            return best
        expert = order[index]
        least = np.inf
        for ranks in combinations([rank for rank, slots in enumerate(free) if slots], int(copies[expert])):
            heavier = tuple(load + share[expert] * (rank in ranks) for rank, load in enumerate(loads))
            left = tuple(slots - (rank in ranks) for rank, slots in enumerate(free))
            least = min(least, further(index + 1, heavier, left))
        return least

    return further(0, (0.0,) * len(capacity), tuple(capacity.tolist()))


@st.composite
def tiny_problems(draw: st.DrawFn) -> Problem:
    experts, ranks = draw(st.integers(1, 5)), draw(st.integers(2, 4))
    slots = -(-experts // ranks) + draw(st.integers(0, 1))
    caps = draw(st.lists(st.integers(1, slots), min_size=ranks, max_size=ranks))
    uneven = tuple(caps) if sum(caps) >= experts and draw(st.booleans()) else ()
    load = draw(st.lists(st.integers(1, 30), min_size=experts, max_size=experts))
    return Problem(
        Topology(1, experts, ranks, slots, rank_slots=uneven),
        np.array([load], dtype=np.float64),
        budget=draw(st.none() | st.integers(0, 3)),
        max_replicas=draw(st.integers(0, 2)),
    )


@settings(max_examples=400, deadline=None)
@given(problem=tiny_problems())
def test_bound_lies_below_the_optimum_and_the_solver_close_above(problem: Problem) -> None:
    bound, best = float(lower_bound(problem)[0]), optimum(problem)
    found = omni(problem).step_load(problem.load)
    assert bound <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= found <= best * 1.5


def test_the_solver_is_close_to_the_optimum_on_average() -> None:
    random = np.random.default_rng(2)
    gaps, gaps_of_bound = [], []
    for _ in range(60):
        experts, ranks = int(random.integers(3, 7)), int(random.integers(2, 4))
        topology = Topology(1, experts, ranks, -(-experts // ranks) + int(random.integers(0, 2)))
        problem = Problem(topology, random.lognormal(0, 1, (1, experts)))
        best = optimum(problem)
        gaps.append(omni(problem).step_load(problem.load) / best - 1)
        gaps_of_bound.append(1 - lower_bound(problem)[0] / best)
    assert np.mean(gaps) < 0.01
    assert np.mean(gaps_of_bound) < 0.08


@pytest.mark.parametrize(
    ("load", "topology", "budget", "bound"),
    [
        pytest.param([1, 1, 1, 1], (1, 4, 2, 2), None, 2.0, id="mean"),
        pytest.param([9, 1, 1, 1], (1, 4, 4, 2), 1, 4.5, id="share"),
        pytest.param([6, 1, 1, 1], (1, 4, 2, 2), 0, 7.0, id="crowd: every slot is taken"),
        pytest.param([0, 0, 0, 0], (1, 4, 2, 2), None, 0.0, id="no load"),
    ],
)
def test_bound_of(load: list[float], topology: tuple[int, int, int, int], budget: int | None, bound: float) -> None:
    problem = Problem(Topology(*topology), np.array([load], dtype=np.float64), budget=budget)
    np.testing.assert_allclose(lower_bound(problem), [bound])


def test_bound_sees_that_copies_do_not_fit_together() -> None:
    """Nine experts of 3 and one of 1 on five ranks of two slots: some rank has two of 3, though 5.6 is the mean."""
    problem = Problem(Topology(1, 10, 5, 2), np.array([[3.0] * 9 + [1.0]]))
    assert optimum(problem) == 6
    assert 5.9 < lower_bound(problem)[0] <= 6
