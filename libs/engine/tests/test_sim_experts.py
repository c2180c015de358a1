"""Expert parallelism of the simulated engine."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_common.errors import FailedPrecondition, InvalidRequest, Unavailable
from omni_engine.ports import ExpertLayout, ExpertMove, PrefillJob, RanksFailed, SamplingParams
from omni_engine.sim import SimEngine, SimSettings, VirtualClock
from omni_engine.sim.experts import SlotMap
from omni_engine.sim.router import Router

FOUR_ON_TWO = {"num_moe_layers": 1, "num_experts": 4, "experts_per_token": 1}
TWO_RANKS = {**FOUR_ON_TWO, "experts": {"num_ranks": 2, "spare_slots": 2, "skew": 2.0, "switch_ms": 0}}


def router(**values: object) -> Router:
    return Router(SimSettings.model_validate(values))


@asynccontextmanager
async def simulated(**values: object) -> AsyncIterator[tuple[SimEngine, VirtualClock]]:
    clock = VirtualClock()
    engine = SimEngine(SimSettings.model_validate(values), clock=clock)
    driver = asyncio.create_task(clock.run())
    await engine.start()
    try:
        yield engine, clock
    finally:
        await engine.close()
        driver.cancel()
        await asyncio.wait({driver})


async def compute(engine: SimEngine, name: str = "a", tokens: int = 64) -> float:
    """A prompt of so many tokens in one step; returns its milliseconds."""
    prompt = [hash(name) % 1000 + 1000, *range(tokens - 1)]
    result = await engine.prefill(PrefillJob(name, prompt, SamplingParams(max_tokens=1, ignore_eos=True)))
    assert result.cached_tokens == 0
    return result.timings.compute_ms


@st.composite
def routers(draw):
    experts = draw(st.integers(1, 12))
    values = {
        "num_moe_layers": draw(st.integers(1, 3)),
        "num_experts": experts,
        "experts_per_token": draw(st.integers(1, experts)),
        "experts": {
            "skew": draw(st.floats(0, 4)),
            "classes": 3,
            "seed": draw(st.integers(0, 99)),
            "drift_tokens": draw(st.sampled_from([0, 100])),
        },
    }
    return SimSettings.model_validate(values)


@given(routers(), st.lists(st.dictionaries(st.integers(0, 2), st.integers(1, 40)), max_size=4))
def test_every_token_goes_to_its_number_of_different_experts(settings, steps):
    ours, again = Router(settings), Router(settings)
    for step in steps:
        counts = ours.route(step)
        tokens = sum(step.values())
        assert (counts.sum(axis=1) == tokens * settings.experts_per_token).all()
        assert (counts >= 0).all() and (counts <= tokens).all()
        assert (counts == again.route(step)).all()


def test_routing_follows_the_popularity_of_the_class():
    ours = router(num_moe_layers=3, num_experts=16, experts_per_token=2, experts={"skew": 1.5, "classes": 2})
    counts = np.stack([ours.route({traffic_class: 4000}) for traffic_class in (0, 1)])
    for traffic_class in (0, 1):
        shares = ours.shares(traffic_class)
        assert np.allclose(shares.sum(axis=1), 2) and shares.max() <= 1
        assert np.abs(counts[traffic_class] / 4000 - shares).max() < 0.04
    popular = counts.argmax(axis=2)
    assert (popular[0] != popular[1]).any()


def test_drift_replaces_the_popular_experts_little_by_little():
    ours = router(num_moe_layers=4, num_experts=16, experts_per_token=1, experts={"drift_tokens": 1000})
    seen = []
    for _ in range(5):
        seen.append(ours.shares(0))
        ours.route({0: 250})
    distance = [float(np.abs(later - seen[0]).sum()) for later in seen]
    assert distance == sorted(distance)
    assert distance[0] == 0 < distance[1] < distance[4] / 2


def test_the_class_follows_from_the_prompt():
    ours = router(experts={"classes": 3})
    assert [ours.class_of([7]), ours.class_of([7, 1]), ours.class_of([4, 3, 2])] == [1, 2, 0]


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(0, 5))
def test_what_ranks_compute_is_what_was_routed(seed, num_ranks, turn):
    drawn = np.random.default_rng(seed)
    held = drawn.random((2, num_ranks, 6)) < 0.5
    held[:, 0] |= ~held.any(axis=1)
    physical = np.where(held, np.arange(6), -1).astype(np.int32)
    counts = drawn.integers(0, 50, (2, 6))
    rank_tokens = SlotMap(physical, frozenset(), 6).rank_tokens(counts, turn)
    assert (rank_tokens.sum(axis=1) == counts.sum(axis=1)).all()
    assert (rank_tokens[~held.any(axis=2)] == 0).all()


def test_copies_take_turns():
    slots = SlotMap(np.array([[[0, 1], [0, 2]]], dtype=np.int32), frozenset(), 3)
    counts = np.array([[1, 0, 0]])
    assert sum(slots.rank_tokens(counts, turn) for turn in range(10)).tolist() == [[5, 5]]


def test_experts_without_a_rank_in_use_are_named():
    physical = np.array([[[0, 1], [0, 2]]], dtype=np.int32)
    with pytest.raises(InvalidRequest, match="layer 0 expert 2"):
        SlotMap(physical, frozenset({1}), 3)


async def test_the_slowest_rank_stretches_the_step():
    async with simulated(**FOUR_ON_TWO) as (plain, _), simulated(**TWO_RANKS) as (engine, _):
        base_ms, stretched_ms = await compute(plain), await compute(engine)
        load = await engine.expert_load()
        assert load.rank_tokens.sum() == load.tokens.sum() == load.routed_tokens == 64
        slowest = load.rank_tokens.max() / load.rank_tokens.mean()
        assert slowest > 1.05
        assert stretched_ms == pytest.approx(base_ms * (0.5 + 0.5 * slowest))
        assert load.duration_ms == pytest.approx(stretched_ms)
        assert (load.steps, load.layout_version) == (1, 0)
        assert (await engine.expert_load()).tokens.sum() == 0


def rearranged(engine: SimEngine, *moves: ExpertMove, version: int = 1) -> ExpertLayout:
    physical = engine.expert_layout().physical.copy()
    for move in moves:
        physical[move.layer, move.target_rank, move.target_slot] = move.expert
    return ExpertLayout(version, physical)


async def test_a_round_takes_its_copy_time_and_pauses_once_at_a_boundary():
    values = TWO_RANKS | {"experts": TWO_RANKS["experts"] | {"expert_bytes": 2**30, "switch_ms": 250.0}}
    async with simulated(**values) as (engine, clock):
        assert engine.expert_layout().physical.tolist() == [[[0, 1, 2], [3, 0, 1]]]
        swap = (ExpertMove(0, 2, 0, 2, 1, 2), ExpertMove(0, 3, 1, 0, 0, 2))
        target = rearranged(engine, *swap)
        started_s = clock.now_s()
        moving = asyncio.create_task(engine.move_experts(swap, target))
        await compute(engine)
        assert engine.expert_layout().version == 0
        await moving
        assert clock.now_s() - started_s == pytest.approx(1.25)
        assert engine.expert_layout() is target
        assert (await engine.expert_load()).rank_tokens.sum() == 0
        await compute(engine, "b")
        assert (await engine.expert_load()).layout_version == 1


@pytest.mark.parametrize(
    ("moves", "wanted", "field"),
    [
        pytest.param([(0, 2, 0, 1, 1, 2)], [[0, 1, 2], [3, 0, 2]], "moves", id="source holds another"),
        pytest.param([(0, 2, 0, 2, 1, 9)], [[0, 1, 2], [3, 0, 1]], "moves", id="no such slot"),
        pytest.param([], [[0, 1, 2], [3, 2, 1]], "moves", id="nobody brings it"),
        pytest.param([(0, 0, 0, 0, 1, 0)], [[0, 1, 2], [0, 0, 1]], "ranks", id="last copy overwritten"),
        pytest.param([], [[0, 1], [2, 3]], "layout", id="other shape"),
    ],
)
async def test_a_round_that_cannot_be_is_refused(moves, wanted, field):
    async with simulated(**TWO_RANKS) as (engine, _):
        before = engine.expert_layout()
        target = ExpertLayout(1, np.array([wanted], dtype=np.int32))
        with pytest.raises(InvalidRequest) as refused:
            await engine.move_experts([ExpertMove(*move) for move in moves], target)
        assert refused.value.field == field
        assert engine.expert_layout() is before


async def test_failed_rounds_leave_the_former_layout():
    async with simulated(**TWO_RANKS) as (engine, _):
        move = ExpertMove(0, 2, 0, 2, 1, 2)
        before, target = engine.expert_layout(), rearranged(engine, move)
        engine.faults.fail_next_moves = 1
        with pytest.raises(Unavailable, match="on purpose"):
            await engine.move_experts([move], target)
        engine.faults.failed_ranks = (1,)
        with pytest.raises(RanksFailed) as failed:
            await engine.move_experts([move], target)
        assert failed.value.ranks == (1,)
        assert engine.expert_layout() is before
        engine.faults.failed_ranks = ()
        cancelled = asyncio.create_task(engine.move_experts([move], target))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait({cancelled})
        await compute(engine)
        assert engine.expert_layout() is before
        await engine.move_experts([move], target)
        assert engine.expert_layout() is target


async def test_dropped_ranks_compute_nothing():
    spare = TWO_RANKS | {"experts": TWO_RANKS["experts"] | {"spare_slots": 4}}
    async with simulated(**spare) as (engine, _), simulated(**TWO_RANKS) as (small, _):
        await engine.drop_ranks([1])
        await compute(engine)
        assert (await engine.expert_load()).rank_tokens.tolist() == [[64, 0]]
        await engine.drop_ranks([])
        await compute(engine, "b")
        assert (await engine.expert_load()).rank_tokens[0, 1] > 0
        with pytest.raises(InvalidRequest, match="layer 0 expert 3"):
            await small.drop_ranks([1])
        await compute(small)
        assert (await small.expert_load()).rank_tokens[0, 1] > 0


async def test_an_engine_that_dies_fails_the_round_under_way():
    values = TWO_RANKS | {"experts": TWO_RANKS["experts"] | {"switch_ms": 1000.0}}
    async with simulated(**values) as (engine, _):
        move = ExpertMove(0, 2, 0, 2, 1, 2)
        moving = asyncio.create_task(engine.move_experts([move], rearranged(engine, move)))
        await asyncio.sleep(0)
        engine.die("gone")
        with pytest.raises(Unavailable, match="gone"):
            await moving


async def test_without_ranks_there_is_nothing_to_move():
    async with simulated() as (engine, _):
        await compute(engine)
        assert await engine.expert_load() is None
        assert engine.expert_layout() is None
        with pytest.raises(FailedPrecondition):
            await engine.drop_ranks([])


@pytest.mark.parametrize("experts", [{"num_ranks": 3}, {"num_ranks": 1, "spare_slots": 1}])
def test_ranks_that_cannot_hold_the_experts_evenly_are_refused(experts):
    with pytest.raises(ValueError, match="num_ranks"):
        SimSettings.model_validate({"experts": experts})
