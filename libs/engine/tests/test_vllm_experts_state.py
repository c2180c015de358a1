"""Rounds between processes, on weights small enough to look at. Nothing of vLLM is started."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from expert_ranks import EXPERTS, LAYERS, on_all_ranks

from omni_engine.vllm_experts import AGREE_EVERY_STEPS

Answers = dict[str, list[Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return on_all_ranks(tmp_path_factory.mktemp("ranks"))


def expected_values(physical: Any, rank: int) -> list[list[list[float]]]:
    return [
        [[100.0 * layer + e for e in physical[layer, rank]], [1000.0 * layer + e for e in physical[layer, rank]]]
        for layer in range(LAYERS)
    ]


def test_a_round_moves_all_weights_and_the_map_on_all_ranks(ranks: Answers) -> None:
    for rank, (error, version, physical, values) in enumerate(ranks["applied"]):
        assert not error
        assert version == 7
        assert physical[0].tolist() == [[5, 1, 2], [3, 4, 0], [0, 1, 2]]
        assert values == expected_values(physical, rank)


def test_a_round_that_one_rank_cannot_do_leaves_all_as_they_were(ranks: Answers) -> None:
    for rank, (error, version, physical, values) in enumerate(ranks["one_rank_fails"]):
        assert error == ("no room" if rank == 1 else "another rank failed")
        assert version == 0
        assert physical[0].tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
        assert values == expected_values(physical, rank)


def test_data_parallel_ranks_apply_at_the_same_step_whenever_they_hear_of_it(ranks: Answers) -> None:
    first, *others = ranks["armed_at_different_steps"]
    assert all(versions == first for versions in others)
    assert first.index(7) == 3 * AGREE_EVERY_STEPS - 1


def test_only_real_tokens_count_and_a_round_loses_none(ranks: Answers) -> None:
    for rank, (tokens, rank_tokens, steps, routed, version, left) in enumerate(ranks["counted"]):
        wanted = [0] * EXPERTS
        wanted[rank] += 2
        # What lies in the last slot of the last rank before and after the round.
        assert tokens[1].tolist() == [w + 3 * (e == 2) for e, w in enumerate(wanted)]
        assert rank_tokens[0].tolist() == [0, 0, 3]
        assert (steps, routed, version, left) == (2, 5, 7, 0)
