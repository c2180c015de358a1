"""The default solver keeps to every part of a problem, for any problem."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_placement.layout import EMPTY, Layout, Topology, from_indicator
from omni_placement.problem import Problem
from omni_placement.solving import omni
from omni_placement.solving.layer import GAP
from omni_placement.solving.levels import COST


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Of all kinds: hosts, groups, ranks of the shared expert, ranks of unlike size."""
    experts, ranks = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    shared = draw(st.sets(st.integers(0, ranks - 1), max_size=ranks - 1))
    least = -(-experts // (ranks - len(shared)))
    slots = least + draw(st.integers(0, 3))
    return Topology(
        draw(st.integers(1, 3)),
        experts,
        ranks,
        slots,
        ranks_per_host=draw(st.integers(0, 3)),
        rank_slots=tuple(draw(st.lists(st.integers(least, slots), min_size=ranks, max_size=ranks))),
        shared_ranks=tuple(shared),
        num_groups=draw(st.sampled_from([n for n in range(1, experts + 1) if experts % n == 0])),
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """With any of budget, cap, failed ranks, pins, spread and a layout in force (which may hold failed ranks)."""
    topology = draw(topologies())
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    load = np.floor(
        random.lognormal(0, draw(st.sampled_from([0.3, 2.0])), (topology.num_layers, topology.num_experts)) * 9
    )
    base = Problem(topology, load)
    current = omni(Problem(topology, random.permuted(load, axis=1))) if draw(st.booleans()) else None
    usable = np.flatnonzero(base.capacity)
    excluded = frozenset[int]()
    if base.capacity.sum() - base.capacity[failed := int(random.choice(usable))] >= topology.num_experts:
        excluded = draw(st.sampled_from([frozenset(), frozenset({failed})]))
    left = Problem(topology, load, excluded_ranks=excluded)
    pinned = _some_pins(left, random) if draw(st.booleans()) else ()
    extra = len(pinned) - len({pin[:2] for pin in pinned})
    return replace(
        left,
        spread=random.random(load.shape) * load if draw(st.booleans()) else None,
        current=current,
        budget=draw(st.none() | st.integers(extra, extra + 12)),
        pinned=pinned,
        max_replicas=draw(st.sampled_from([0, 3 if pinned else 1, 6])),
    )


def _some_pins(problem: Problem, random: np.random.Generator) -> tuple[tuple[int, int, int], ...]:
    """Of a layout that solves the problem, at most three copies of an expert."""
    pins = np.argwhere(omni(replace(problem, max_replicas=3)).indicator.transpose(1, 2, 0))
    return tuple(map(tuple, pins[random.random(len(pins)) < 0.3].tolist()))


@settings(max_examples=300, deadline=None)
@given(problem=problems())
def test_every_part_of_a_problem_holds(problem: Problem) -> None:
    layout = omni(problem)
    assert layout.topology == problem.topology
    assert ((layout.physical != EMPTY).sum(axis=2) <= problem.capacity).all()
    assert (layout.replicas <= problem.replica_limit).all()
    assert (layout.replicas - 1).sum() <= problem.extra_replicas
    assert all(layout.indicator[rank, layer, expert] for layer, expert, rank in problem.pinned)
    np.testing.assert_allclose(layout.rank_loads(problem.load).sum(axis=1), problem.load.sum(axis=1))
    held = from_indicator(layout.indicator, problem.topology.slots_per_rank)
    assert np.array_equal(np.sort(held.physical, axis=2), np.sort(layout.physical, axis=2))


@settings(deadline=None)
@given(problem=problems())
def test_the_same_problem_has_the_same_answer(problem: Problem) -> None:
    assert omni(problem) == omni(replace(problem, load=problem.load.copy()))


@settings(max_examples=50, deadline=None)
@given(topology=topologies(), seed=st.integers(0, 2**32 - 1), sigma=st.sampled_from([0.3, 1.0, 2.0]))
def test_a_larger_budget_never_makes_the_step_longer(topology: Topology, seed: int, sigma: float) -> None:
    """But for what bringing groups together may cost, within the gap that the solver leaves, and what leaving no slot
    empty may cost where there is no budget."""
    topology = replace(topology, num_groups=1)
    load = np.random.default_rng(seed).lognormal(0, sigma, (topology.num_layers, topology.num_experts))
    most = Problem(topology, load).extra_replicas
    steps = [omni(Problem(topology, load, budget=budget)).step_load(load) for budget in range(most + 2)]
    assert (np.diff(steps) <= 1e-9 * steps[0]).all()
    assert omni(Problem(topology, load)).step_load(load) <= (1 + COST) * (1 + GAP) * steps[-1]


@settings(deadline=None)
@given(problem=problems())
def test_what_stays_on_a_rank_stays_in_its_slot(problem: Problem) -> None:
    if problem.current is None:
        return
    old, new = problem.current.physical, omni(problem).physical
    stays = (old != EMPTY) & (old[:, :, :, None] == new[:, :, None, :]).any(axis=3)
    assert np.array_equal(new[stays], old[stays])


@settings(deadline=None)
@given(problem=problems())
def test_a_layout_that_is_good_enough_is_left_alone(problem: Problem) -> None:
    layout = omni(replace(problem, current=None))
    assert omni(replace(problem, current=layout)) == layout


def test_a_load_of_zeros_is_spread_over_the_ranks() -> None:
    layout = omni(Problem(Topology(2, 8, 4, 3), np.zeros((2, 8)), budget=0))
    assert ((layout.physical != EMPTY).sum(axis=2) == 2).all()


def test_the_budget_goes_to_the_layers_that_need_it() -> None:
    load = np.array([[1.0] * 8, [9.0] + [1.0] * 7, [1.0] * 8])
    layout = omni(Problem(Topology(3, 8, 4, 6), load, budget=2))
    extra = layout.replicas.sum(axis=1) - 8
    assert extra.tolist() == [0, 2, 0]
    assert layout.step_load(load) == 2 + 4 + 2


def test_ranks_of_the_shared_expert_and_failed_ones_stay_empty() -> None:
    topology = Topology(4, 128, 72, 3, ranks_per_host=8, shared_ranks=tuple(range(64, 72)))
    load = _skewed(4, 128)
    layout = omni(Problem(topology, load, excluded_ranks=frozenset({5, 6})))
    assert (layout.physical[:, [5, 6, *range(64, 72)]] == EMPTY).all()
    assert layout.balancedness(load, frozenset({5, 6})).mean() > 0.9


def test_a_failed_rank_is_emptied_with_few_moves() -> None:
    topology, load = Topology(4, 64, 16, 6), _skewed(4, 64)
    before = omni(Problem(topology, load))
    after = omni(Problem(topology, load, current=before, excluded_ranks=frozenset({3})))
    assert (after.physical[:, 3] == EMPTY).all()
    gained = (after.indicator > before.indicator).sum()
    lost = (before.physical[:, 3] != EMPTY).sum()
    assert gained <= 5 * lost
    assert after.balancedness(load, frozenset({3})).mean() > 0.97


def _skewed(layers: int, experts: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng(5).lognormal(0, 1, (layers, experts))


def _held_at_home(layout: Layout, load: npt.NDArray[np.float64]) -> float:
    """Share of the load that lies on the host with most of its group."""
    topology = layout.topology
    share = layout.indicator * (load / layout.replicas)
    groups = share.reshape(topology.num_ranks, topology.num_layers, topology.num_groups, -1).sum(axis=3)
    by_host = np.stack([groups[topology.hosts == host].sum(axis=0) for host in np.unique(topology.hosts)])
    return float(by_host.max(axis=0).sum() / load.sum())


def test_groups_are_brought_together_on_hosts_without_cost() -> None:
    load = _skewed(4, 128)
    apart = Topology(4, 128, 16, 9, ranks_per_host=4)
    together = replace(apart, num_groups=8)
    plain, gathered = omni(Problem(apart, load)), omni(Problem(together, load))
    assert gathered.step_load(load) <= plain.step_load(load) * 1.001
    scattered = Layout(together, plain.physical)
    assert _held_at_home(scattered, load) < 0.6
    assert _held_at_home(gathered, load) > 0.75
