"""Layouts as arrays: what a rank routes to, and which rounds are refused. Nothing of vLLM is started."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omni_common.errors import InvalidRequest
from omni_engine.ports import ExpertMove
from omni_engine.vllm_expert_maps import (
    EMPTY,
    Bools,
    Physical,
    check_round,
    homeless,
    initial_layout,
    logical_counts,
    ranks_mask,
    routing_tables,
)
from omni_engine.vllm_expert_shims import map_and_record

EXPERTS = 5


@st.composite
def layouts(draw: st.DrawFn) -> Physical:
    """Two layers, up to four ranks; every expert lives somewhere and no rank holds one twice."""
    ranks = draw(st.integers(2, 4))
    slots = EXPERTS
    physical = np.full((2, ranks, slots), EMPTY, dtype=np.int32)
    for layer in range(2):
        held = [set(draw(st.sets(st.integers(0, EXPERTS - 1)))) for _ in range(ranks)]
        for expert in range(EXPERTS):
            if not any(expert in experts for experts in held):
                held[draw(st.integers(0, ranks - 1))].add(expert)
        for rank, experts in enumerate(held):
            places = draw(st.permutations(range(slots)))[: len(experts)]
            physical[layer, rank, places] = draw(st.permutations(sorted(experts)))
    return physical


def masks(ranks: int) -> st.SearchStrategy[Bools]:
    return st.lists(st.booleans(), min_size=ranks, max_size=ranks).map(np.array)


@given(st.data())
def test_a_rank_routes_to_all_of_the_closest_usable_copies_and_to_no_other(data: st.DataObject) -> None:
    physical = data.draw(layouts())
    ranks, slots = physical.shape[1:]
    near, same_host, usable = (data.draw(masks(ranks)) for _ in range(3))
    table, counts = routing_tables(physical, EXPERTS, near, same_host, usable)
    for layer in range(len(physical)):
        for expert in range(EXPERTS):
            holders = [rank for rank in range(ranks) if expert in physical[layer, rank] and usable[rank]]
            closest = (
                [rank for rank in holders if near[rank]] or [rank for rank in holders if same_host[rank]] or holders
            )
            chosen = table[layer, expert, : counts[layer, expert]]
            assert [int(copy) // slots for copy in chosen] == closest
            assert all(physical[layer].reshape(-1)[chosen] == expert)
            assert all(table[layer, expert, counts[layer, expert] :] == EMPTY)


@given(st.data())
def test_experts_without_a_usable_rank_are_named(data: st.DataObject) -> None:
    physical = data.draw(layouts())
    usable = data.draw(masks(physical.shape[1]))
    lost = homeless(physical, EXPERTS, usable)
    assert lost == [
        (layer, expert) for layer in range(2) for expert in range(EXPERTS) if expert not in physical[layer, usable]
    ]


@given(st.data())
def test_counts_of_slots_are_counts_of_experts(data: st.DataObject) -> None:
    physical = data.draw(layouts())
    flat = physical.reshape(2, -1)
    counts = np.where(flat == EMPTY, 0, np.arange(flat.size).reshape(flat.shape))
    logical = logical_counts(counts, physical, EXPERTS)
    for layer, expert in np.ndindex(2, EXPERTS):
        assert logical[layer, expert] == counts[layer][flat[layer] == expert].sum()


@given(st.data())
def test_a_round_that_fits_is_accepted(data: st.DataObject) -> None:
    """Between two layouts all moves at once are a round: every one is read before any is written."""
    current = data.draw(layouts())
    target = data.draw(layouts().filter(lambda layout: layout.shape == current.shape))
    moves = []
    for layer, rank, slot in np.argwhere((target != current) & (target != EMPTY)):
        expert = target[layer, rank, slot]
        source_rank, source_slot = np.argwhere(current[layer] == expert)[-1]
        moves.append(ExpertMove(*map(int, (layer, expert, source_rank, source_slot, rank, slot))))
    check_round(current, moves, target, EXPERTS)


CURRENT = initial_layout(1, 4, 2, 3)  # [0 1 2] [3 0 1]


def changed(*places: tuple[int, int, int]) -> Physical:
    target = CURRENT.copy()
    for rank, slot, expert in places:
        target[0, rank, slot] = expert
    return target


@pytest.mark.parametrize(
    ("moves", "target", "names"),
    [
        pytest.param([ExpertMove(0, 2, 0, 1, 1, 1)], changed((1, 1, 2)), "holds 1", id="wrong source"),
        pytest.param([ExpertMove(0, 2, 0, 2, 2, 1)], changed((1, 1, 2)), "target_rank 2", id="no such rank"),
        pytest.param([], changed((1, 1, 2)), "expert 2 is to lie in slot 1", id="not moved"),
        pytest.param([ExpertMove(0, 2, 0, 2, 1, 1)], changed(), "expert 0 is to lie", id="overwritten but kept"),
        pytest.param([], changed((0, 2, EMPTY)), "expert 2 of layer 0 lies on no rank", id="lost"),
        pytest.param([ExpertMove(0, 3, 1, 0, 1, 1)], changed((1, 1, 3)), "twice on rank 1", id="twice on a rank"),
        pytest.param(
            [ExpertMove(0, 2, 0, 2, 1, 1), ExpertMove(0, 3, 1, 0, 1, 1)], changed((1, 1, 2)), "two moves", id="two"
        ),
        pytest.param([], CURRENT[:, :, :2], "shape", id="another shape"),
    ],
)
def test_a_round_that_does_not_fit_is_refused(moves: list[ExpertMove], target: Physical, names: str) -> None:
    with pytest.raises(InvalidRequest, match=names):
        check_round(CURRENT, moves, target, 4)


def test_tokens_spread_over_copies_alike_on_every_rank() -> None:
    everyone = np.ones(2, dtype=np.bool_)
    table, counts = map(torch.from_numpy, routing_tables(CURRENT, 4, everyone, everyone, everyone))
    logical = torch.tensor([[0, 3]], dtype=torch.int32).repeat(1000, 1)
    seen = torch.zeros(6, dtype=torch.int32)
    physical = map_and_record(logical, seen, table[0], counts[0], torch.tensor(True), torch.tensor(900))
    assert physical.dtype == logical.dtype
    assert set(physical[:, 1].tolist()) == {3}
    assert seen.tolist() == torch.bincount(physical[:900].flatten().long(), minlength=6).tolist()
    assert seen.sum() == 1800
    assert abs(int(seen[0]) - 450) < 10
    again = map_and_record(logical, seen.clone(), table[0], counts[0], torch.tensor(False))
    assert torch.equal(again, physical)


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_tokens_that_come_in_a_pattern_spread_too(step: int) -> None:
    """Every second or third token of a prompt may choose one expert."""
    logical = torch.ones(4096, 1, dtype=torch.int32)
    logical[::step] = 0
    everyone = np.ones(2, dtype=np.bool_)
    table, counts = map(torch.from_numpy, routing_tables(CURRENT, 4, everyone, everyone, everyone))
    seen = torch.zeros(6, dtype=torch.int32)
    map_and_record(logical, seen, table[0], counts[0], torch.tensor(True))
    assert abs(int(seen[0]) - int(seen[4])) < 0.1 * int(seen[0] + seen[4])


def test_data_parallel_ranks_keep_tokens_to_themselves() -> None:
    everyone = np.ones(2, dtype=np.bool_)
    for rank in range(2):
        table, counts = routing_tables(CURRENT, 4, ranks_mask(2, [rank]), everyone, everyone)
        assert counts[0].tolist() == [1, 1, 1, 1]
        assert [copy // 3 for copy in table[0, :, 0]] == [rank, rank, 0, 1]
