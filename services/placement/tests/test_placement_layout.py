"""Layouts, solvers and load windows as values."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_common.errors import InvalidRequest, ResourceExhausted
from omni_placement.layout import EMPTY, Layout, Topology, from_indicator
from omni_placement.solvers import SOLVERS
from omni_placement.windows import LoadBook, Window


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


@settings(max_examples=50, deadline=None)
@given(topology=topologies(), name=st.sampled_from(sorted(SOLVERS)))
def test_every_solver_answers_a_valid_layout(topology: Topology, name: str) -> None:
    load = np.ones((topology.num_layers, topology.num_experts), dtype=np.int64)
    layout = SOLVERS[name](topology, load, None)
    assert layout.topology == topology
    assert (layout.replicas >= 1).all()
    assert not layout.physical.flags.writeable


@pytest.mark.parametrize(
    ("solver", "topology", "ranks"),
    [
        pytest.param("identity", (1, 4, 2, 2), [[0, 1], [2, 3]], id="identity"),
        pytest.param("identity", (1, 5, 2, 4), [[0, 1, 2, -1], [3, 4, -1, -1]], id="identity, uneven with spare"),
        pytest.param("round_robin", (1, 4, 2, 2), [[0, 2], [1, 3]], id="round robin"),
        pytest.param("round_robin", (1, 3, 2, 2), [[0, 2], [1, 0]], id="round robin, one copy"),
        pytest.param("round_robin", (1, 2, 2, 3), [[0, 1, -1], [1, 0, -1]], id="round robin, more slots than experts"),
    ],
)
def test_solver_places(solver: str, topology: tuple[int, int, int, int], ranks: list[list[int]]) -> None:
    shape = Topology(*topology)
    load = np.ones((shape.num_layers, shape.num_experts), dtype=np.int64)
    assert SOLVERS[solver](shape, load, None).physical[0].tolist() == ranks


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


@pytest.mark.parametrize("shape", [(0, 1, 1, 1), (1, 9, 4, 2), (5000, 5000, 5000, 5000)])
def test_infeasible_topology_is_named(shape: tuple[int, int, int, int]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Topology(*shape)
    assert refused.value.reason == "infeasible_topology"
    assert refused.value.field and refused.value.field.startswith("topology")


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 100), min_size=1, max_size=30), bound=st.integers(1, 5))
def test_window_slides(counts: list[int], bound: int) -> None:
    book = LoadBook(windows=bound, models=1)
    for step, count in enumerate(counts):
        window = Window("w", step, step, np.array([[count, 1]]))
        assert book.add("m", window)
        assert not book.add("m", window)
    total = book.total("m")
    assert total is not None and total.tolist() == [[sum(counts[-bound:]), min(bound, len(counts))]]


def test_windows_of_a_new_shape_start_afresh_and_models_are_bounded() -> None:
    book = LoadBook(windows=4, models=1)
    book.add("m", Window("w", 1, 2, np.array([[1, 2]])))
    book.add("m", Window("w", 3, 4, np.array([[5]])))
    total = book.total("m")
    assert total is not None and total.tolist() == [[5]]
    assert book.total("other") is None
    with pytest.raises(ResourceExhausted):
        book.add("other", Window("w", 1, 2, np.array([[1]])))
    with pytest.raises(InvalidRequest):
        Window("w", 2, 1, np.array([[1]]))
