from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefixindex.baselines import DictIndex, depths
from prefixindex.population import populate
from prefixindex.replica import churn
from prefixindex.timing import latency_of, timed
from prefixindex.traffic import SHAPES, batches, blocks_in

from omni.kvstore.v1 import kvstore_service_pb2 as pb
from omni_common.blocks import KEY_BYTES, SPAN_BLOCKS


@given(holders=st.lists(st.sets(st.integers(0, 5)), max_size=8))
def test_depths_are_the_longest_leading_runs(holders: list[set[int]]) -> None:
    expected = {}
    for member in range(6):
        run = next((i for i, held in enumerate(holders) if member not in held), len(holders))
        if run:
            expected[member] = run
    assert depths(holders) == expected


def test_the_dict_answers_as_the_population_says() -> None:
    population = populate(4000, 8, 1, spread=(8, 3), prompt_blocks=1500)
    index = DictIndex()
    for run in population.runs():
        assert run.first % SPAN_BLOCKS == 0 and run.span == run.keys[:KEY_BYTES]
        index.store(run.worker, run.keys)
    assert [len(prompt.depths) for prompt in population.spread] == [8, 3]
    for prompt in population.prompts:
        assert index.lookup(prompt.keys) == prompt.depths
        assert index.lookup(prompt.keys[: 100 * KEY_BYTES]) == prompt.expected(100)
    for run in population.runs():
        index.remove(run.worker, run.keys)
    assert not any(index.lookup(prompt.keys) for prompt in population.prompts)


def test_populations_depend_on_the_seed_alone() -> None:
    assert populate(3000, 4, 7, spread=(4,), prompt_blocks=1000) == populate(
        3000, 4, 7, spread=(4,), prompt_blocks=1000
    )
    assert populate(3000, 4, 7, spread=(4,), prompt_blocks=1000) != populate(
        3000, 4, 8, spread=(4,), prompt_blocks=1000
    )


def test_churn_removes_what_it_stored() -> None:
    held: Counter[tuple[str, bytes]] = Counter()
    for message in churn(workers=3, size=16, blocks=20_000, seed=1):
        held[message.worker, message.keys] += 1 if message.is_store else -1
        assert set(held.values()) <= {0, 1}
    assert sum(held.values()) == 64


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_batches_store_and_remove_alike_in_the_end(shape: object) -> None:
    made = list(batches("w", shape, 20, seed=1))
    assert [request.sequence for request in made] == list(range(1, 21))
    held: set[bytes] = set()
    for request in made:
        for event in request.events:
            assert len(event.span) == KEY_BYTES
            if event.action == pb.BLOCK_ACTION_STORED:
                assert event.positions[0] % SPAN_BLOCKS + len(event.block_keys) // KEY_BYTES <= SPAN_BLOCKS
                held.add(event.block_keys)
            else:
                held.remove(event.block_keys)
    assert blocks_in(made[-1]) == 2 * shape.runs * shape.run_blocks
    assert made == list(batches("w", shape, 20, seed=1))
    assert made != list(batches("other", shape, 20, seed=1))


def test_percentiles_are_nearest_ranks() -> None:
    latency = latency_of([i / 1e6 for i in range(200, 0, -1)])
    assert (round(latency.p50_us), round(latency.p99_us), latency.count) == (100, 198, 200)


def test_at_least_three_calls_are_timed_and_no_more_than_asked() -> None:
    calls = iter([lambda: None] * 20)
    assert len(timed(calls, lambda: None, most=7, budget_s=60)) == 7
    assert len(timed(calls, lambda: None, most=7, budget_s=0)) == 3
