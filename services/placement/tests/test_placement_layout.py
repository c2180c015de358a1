"""Topologies and layouts as values, and what the simplest solvers place."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_common.errors import InvalidRequest
from omni_placement.layout import EMPTY, Layout, Topology, from_indicator
from omni_placement.problem import Problem
from omni_placement.solvers import SOLVERS


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    experts, ranks = draw(st.integers(1, 24)), draw(st.integers(1, 8))
    least = -(-experts // ranks)
    return Topology(draw(st.integers(1, 4)), experts, ranks, draw(st.integers(least, least + 4)))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any valid layout: each expert on a random rank with room, then random copies and holes."""
    topology = draw(topologies())
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    physical = np.full(topology.shape, EMPTY, dtype=np.int32)
    for layer in range(topology.num_layers):
        free = random.permutation(topology.num_ranks * topology.slots_per_rank)
        order = random.permutation(topology.num_experts)
        physical[layer].reshape(-1)[free[: len(order)]] = order
        for index in free[len(order) :]:
            rank, slot = divmod(int(index), topology.slots_per_rank)
            expert = int(random.integers(topology.num_experts))
            if expert not in physical[layer, rank] and random.random() < 0.7:
                physical[layer, rank, slot] = expert
    return Layout(topology, physical)


@settings(deadline=None)
@given(layout=layouts())
def test_indicator_round_trip_keeps_what_each_rank_holds(layout: Layout) -> None:
    indicator = layout.indicator
    shape = layout.topology
    assert indicator.dtype == np.int32
    assert indicator.shape == (shape.num_ranks, shape.num_layers, shape.num_experts)
    back = from_indicator(indicator, shape.slots_per_rank)
    assert np.array_equal(np.sort(back.physical, axis=2), np.sort(layout.physical, axis=2))
    assert from_indicator(back.indicator, shape.slots_per_rank) == back
    assert hash(from_indicator(back.indicator, shape.slots_per_rank)) == hash(back)


@settings(deadline=None)
@given(layout=layouts(), seed=st.integers(0, 2**32 - 1))
def test_load_is_conserved_and_balancedness_bounded(layout: Layout, seed: int) -> None:
    shape = layout.topology
    load = np.random.default_rng(seed).integers(0, 1000, (shape.num_layers, shape.num_experts))
    np.testing.assert_allclose(layout.rank_loads(load).sum(axis=1), load.sum(axis=1))
    balancedness = layout.balancedness(load)
    assert ((balancedness > 0) & (balancedness <= 1)).all()


@pytest.mark.parametrize(
    ("solver", "topology", "ranks"),
    [
        pytest.param("identity", Topology(1, 4, 2, 2), [[0, 1], [2, 3]], id="identity"),
        pytest.param("identity", Topology(1, 5, 2, 4), [[0, 1, 2, -1], [3, 4, -1, -1]], id="identity, with spare"),
        pytest.param(
            "identity",
            Topology(1, 4, 3, 3, rank_slots=(1, 3, 3), shared_ranks=(2,)),
            [[0, -1, -1], [1, 2, 3], [-1, -1, -1]],
            id="identity, uneven ranks and one of the shared expert",
        ),
        pytest.param("round_robin", Topology(1, 4, 2, 2), [[0, 2], [1, 3]], id="round robin"),
        pytest.param("round_robin", Topology(1, 3, 2, 2), [[0, 2], [1, 0]], id="round robin, one copy"),
        pytest.param("round_robin", Topology(1, 2, 2, 3), [[0, 1, -1], [1, 0, -1]], id="round robin, slots to spare"),
    ],
)
def test_simple_solver_places(solver: str, topology: Topology, ranks: list[list[int]]) -> None:
    load = np.ones((topology.num_layers, topology.num_experts))
    assert SOLVERS[solver](Problem(topology, load)).physical[0].tolist() == ranks


def test_simple_solvers_keep_to_budget_and_ranks_and_refuse_what_they_do_not_know() -> None:
    topology, load = Topology(2, 3, 3, 2), np.ones((2, 3))
    for name, copies in {"identity": 3, "round_robin": 4}.items():
        layout = SOLVERS[name](Problem(topology, load, budget=3, excluded_ranks=frozenset({1})))
        assert (layout.physical[:, 1] == EMPTY).all()
        assert layout.replicas.sum(axis=1).tolist() == [copies, copies]
        with pytest.raises(InvalidRequest) as refused:
            SOLVERS[name](Problem(topology, load, pinned=((0, 0, 0),)))
        assert (refused.value.field, refused.value.reason) == ("pinned", "unsupported")


def test_step_waits_for_the_slowest_rank_of_each_layer() -> None:
    layout = Layout(Topology(2, 2, 2, 2), np.array([[[0, -1], [1, -1]], [[0, 1], [1, -1]]], dtype=np.int32))
    assert layout.step_load(np.array([[3, 1], [3, 2]])) == 3 + 4


def test_balancedness_counts_only_ranks_that_can_hold_experts() -> None:
    topology = Topology(1, 2, 4, 2, rank_slots=(2, 2, 2, 0), shared_ranks=(1,))
    layout = Layout(topology, np.array([[[0, -1], [-1, -1], [1, -1], [-1, -1]]], dtype=np.int32))
    load = np.array([[3, 1]])
    assert layout.balancedness(load).tolist() == [2 / 3]
    alone = Layout(topology, np.array([[[0, 1], [-1, -1], [-1, -1], [-1, -1]]], dtype=np.int32))
    assert alone.balancedness(load, frozenset({2})).tolist() == [1.0]


def test_balancedness_is_mean_over_slowest() -> None:
    layout = Layout(Topology(2, 2, 2, 2), np.array([[[0, -1], [1, -1]], [[0, 1], [1, -1]]], dtype=np.int32))
    assert layout.balancedness(np.array([[3, 1], [0, 0]])).tolist() == [2 / 3, 1.0]
    assert layout.rank_loads(np.array([[3, 1], [3, 2]])).tolist() == [[3.0, 1.0], [4.0, 1.0]]


@pytest.mark.parametrize(
    ("physical", "message"),
    [
        pytest.param([[[0, 0], [1, 2]]], "more than once", id="twice on a rank"),
        pytest.param([[[0, 1], [0, 1]]], "on no rank", id="missing"),
        pytest.param([[[0, 1], [2, 3]]], "numbered", id="unknown expert"),
        pytest.param([[[0, 1], [2, -2]]], "numbered", id="negative"),
        pytest.param([[[0, 1, 2]]], "shape", id="shape"),
    ],
)
def test_invalid_layout_cannot_exist(physical: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Layout(Topology(1, 3, 2, 2), np.array(physical, dtype=np.int32))


@pytest.mark.parametrize(
    ("indicator", "slots"),
    [
        pytest.param([[[1, 2]]], None, id="not 0/1"),
        pytest.param([[1, 0]], None, id="not three axes"),
        pytest.param([[[1, 1]], [[1, 0]]], 1, id="does not fit"),
        pytest.param([[[1, 0]]], None, id="expert missing"),
    ],
)
def test_other_arrays_are_no_layouts(indicator: Any, slots: int | None) -> None:
    with pytest.raises(InvalidRequest):
        from_indicator(np.array(indicator, dtype=np.int32), slots)


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        pytest.param({"num_layers": 0}, "num_layers", id="no layer"),
        pytest.param({"slots_per_rank": 2}, "slots_per_rank", id="too few slots"),
        pytest.param({"shared_ranks": (0, 1)}, "slots_per_rank", id="too few ranks for routed experts"),
        pytest.param({"rank_slots": (1, 1, 1, 1)}, "slots_per_rank", id="too little memory"),
        pytest.param({"rank_slots": (3, 3)}, "rank_slots", id="memory of some ranks"),
        pytest.param({"rank_slots": (4, 3, 3, 3)}, "rank_slots", id="more memory than slots"),
        pytest.param({"shared_ranks": (4,)}, "shared_ranks", id="unknown rank"),
        pytest.param({"num_groups": 2}, "num_groups", id="uneven groups"),
        pytest.param({"ranks_per_host": -1}, "ranks_per_host", id="negative"),
        pytest.param({"num_layers": 5000, "num_ranks": 5000}, "", id="beyond the bound on slots"),
        pytest.param({"expert_bytes": 2**64 - 1}, "expert_bytes", id="beyond any expert"),
    ],
)
def test_infeasible_topology_is_named(parts: dict[str, Any], field: str) -> None:
    shape = {"num_layers": 1, "num_experts": 9, "num_ranks": 4, "slots_per_rank": 3}
    with pytest.raises(InvalidRequest) as refused:
        Topology(**{**shape, **parts})
    assert refused.value.reason == "infeasible_topology"
    assert refused.value.field == (f"topology.{field}" if field else "topology")


def test_hosts_and_capacity_follow_from_the_topology() -> None:
    topology = Topology(1, 4, 4, 3, ranks_per_host=2, rank_slots=(3, 2, 1, 3), shared_ranks=(3,))
    assert topology.hosts.tolist() == [0, 0, 1, 1]
    assert topology.capacity.tolist() == [3, 2, 1, 0]
    assert Topology(1, 4, 4, 1).hosts.tolist() == [0, 0, 0, 0]
