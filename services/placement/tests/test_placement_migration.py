"""Rounds from any layout to any other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_common.errors import FailedPrecondition, InvalidRequest
from omni_placement.layout import EMPTY, Layout, Topology
from omni_placement.migration import Drop, Move, Round, apply_rounds, fewest_rounds, moved_bytes, rounds

Rng = np.random.Generator


def random_layout(topology: Topology, random: Rng, density: float, excluded: frozenset[int] = frozenset()) -> Layout:
    """Each expert on a random rank with room, then copies in a share of the slots left."""
    physical = np.full(topology.shape, EMPTY, dtype=np.int32)
    for layer in range(topology.num_layers):
        usable = [(r, s) for r, n in enumerate(topology.capacity) if r not in excluded for s in range(n)]
        random.shuffle(usable)
        for expert, (rank, slot) in zip(random.permutation(topology.num_experts), usable, strict=False):
            physical[layer, rank, slot] = expert
        for rank, slot in usable[topology.num_experts :]:
            expert = random.integers(topology.num_experts)
            if expert not in physical[layer, rank] and random.random() < density:
                physical[layer, rank, slot] = expert
    return Layout(topology, physical)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    ranks = draw(st.integers(1, 7))
    slots = draw(st.integers(1, 4))
    rank_slots = draw(st.just(()) | st.tuples(*[st.integers(1, slots)] * ranks))
    shared = draw(st.sets(st.integers(1, 6)).map(lambda chosen: tuple(r for r in chosen if r < ranks)))
    usable = sum(n for r, n in enumerate(rank_slots or (slots,) * ranks) if r not in shared)
    experts, hosts = draw(st.integers(1, usable)), draw(st.integers(0, 3))
    return Topology(draw(st.integers(1, 3)), experts, ranks, slots, hosts, rank_slots, shared, expert_bytes=7)


@st.composite
def migrations(draw: st.DrawFn) -> tuple[Layout, Layout]:
    topology, random = draw(topologies()), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    density = draw(st.sampled_from([0.0, 0.5, 1.0]))
    return random_layout(topology, random, density), random_layout(topology, random, density)


def held(layout: Layout) -> np.ndarray:
    return np.sort(layout.physical, axis=2)


@settings(deadline=None, max_examples=300)
@given(migration=migrations())
def test_any_layout_becomes_any_other_in_valid_rounds_of_one_transfer_per_rank(
    migration: tuple[Layout, Layout],
) -> None:
    current, target = migration
    steps = rounds(current, target)
    layout, sent = current, 0
    for step in steps:
        layout = apply_rounds(layout, [step])  # a Layout that exists is valid
        network = [m for m in step.moves if m.source_rank != m.target_rank]
        assert len({m.source_rank for m in network}) == len({m.target_rank for m in network}) == len(network)
        used = (layout.physical != EMPTY).sum(axis=2)
        assert (used <= layout.topology.capacity).all()
        sent += len(network)
    assert np.array_equal(held(layout), held(target))
    assert sent * 7 == moved_bytes(current, target)  # nothing is sent that the rank holds, nothing twice
    assert fewest_rounds(current, target) <= len(steps)
    assert rounds(current, target) == steps


@settings(deadline=None)
@given(migration=migrations())
def test_what_stays_on_a_rank_stays_in_its_slot(migration: tuple[Layout, Layout]) -> None:
    current, target = migration
    final = apply_rounds(current, rounds(current, target))
    kept = np.zeros(current.physical.shape, dtype=bool)
    for place in np.argwhere(current.physical != EMPTY):
        kept[tuple(place)] = current.physical[tuple(place)] in target.physical[place[0], place[1]]
    assert np.array_equal(final.physical[kept], current.physical[kept])
    assert rounds(final, target) == ()


@settings(deadline=None)
@given(migration=migrations(), stop=st.integers(0, 20))
def test_a_migration_resumes_from_any_round(migration: tuple[Layout, Layout], stop: int) -> None:
    current, target = migration
    steps = rounds(current, target)
    middle = apply_rounds(current, steps[:stop])
    rest = rounds(middle, target)
    assert np.array_equal(held(apply_rounds(middle, rest)), held(target))
    assert moved_bytes(middle, target) == moved_bytes(current, target) - 7 * sum(len(s.moves) for s in steps[:stop])


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_failed_ranks_send_nothing_and_are_empty_after_the_first_round(data: st.DataObject) -> None:
    topology, seed = data.draw(topologies()), data.draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    failed = frozenset(data.draw(st.sets(st.integers(0, topology.num_ranks - 1), min_size=1)))
    if sum(n for r, n in enumerate(topology.capacity) if r not in failed) < topology.num_experts:
        return
    current, target = random_layout(topology, random, 1.0), random_layout(topology, random, 1.0, failed)
    alive = [r for r in range(topology.num_ranks) if r not in failed]
    if (current.indicator[alive].sum(axis=0) == 0).any():
        with pytest.raises(FailedPrecondition) as lost:
            rounds(current, target, failed)
        gone = np.argwhere(current.indicator[alive].sum(axis=0) == 0)
        assert (lost.value.field, lost.value.reason) == ("excluded_ranks", "lost_expert")
        assert all(f"{expert} of layer {layer}" in lost.value.message for layer, expert in gone[:8])
        assert ("more" in lost.value.message) == (len(gone) > 8)
        return
    layout = current
    for step in rounds(current, target, failed):
        assert failed.isdisjoint(r for m in step.moves for r in (m.source_rank, m.target_rank))
        layout = apply_rounds(layout, [step])
        assert (layout.physical[:, list(failed)] == EMPTY).all()
    assert np.array_equal(held(layout), held(target))


def test_full_ranks_exchange_in_one_round() -> None:
    shape = Topology(1, 4, 2, 2)
    steps = rounds(layout_of(shape, [[0, 1], [2, 3]]), layout_of(shape, [[0, 2], [1, 3]]))
    assert steps == (Round((Move(0, 1, 0, 1, 1, 0), Move(0, 2, 1, 0, 0, 1))),)


def test_sources_on_the_same_host_are_preferred() -> None:
    shape = Topology(1, 2, 4, 1, ranks_per_host=2)
    steps = rounds(layout_of(shape, [[0], [1], [-1], [0]]), layout_of(shape, [[0], [1], [0], [0]]))
    assert steps == (Round((Move(0, 0, 3, 0, 2, 0),)),)


def test_layouts_that_differ_in_copies_only_drop_them() -> None:
    shape = Topology(1, 1, 2, 1)
    assert rounds(layout_of(shape, [[0], [0]]), layout_of(shape, [[-1], [0]])) == (Round((), (Drop(0, 0, 0),)),)


def test_what_cannot_be_is_named() -> None:
    shape = Topology(1, 2, 2, 2)
    layout = layout_of(shape, [[0, 1], [-1, 0]])
    with pytest.raises(InvalidRequest, match="topologies"):
        rounds(layout, layout_of(Topology(1, 2, 1, 2), [[0, 1]]))
    with pytest.raises(InvalidRequest, match="failed rank 1"):
        rounds(layout, layout, frozenset({1}))
    with pytest.raises(InvalidRequest, match="where the expert is not"):
        apply_rounds(layout, [Round((Move(0, 1, 1, 0, 0, 0),))])
    with pytest.raises(InvalidRequest, match="on no rank"):
        apply_rounds(layout, [Round((), (Drop(0, 0, 1),))])


def layout_of(shape: Topology, ranks: list[list[int]]) -> Layout:
    return Layout(shape, np.array([ranks], dtype=np.int32))
