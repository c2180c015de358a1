import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from placementday.replay import replay, start_layout
from placementday.report import as_json, block_of, draw, verdicts
from placementday.runs import TITLES, Scene, run, system
from placementday.systems import Every, Never, Oracle, Service
from placementday.traffic import CLASSES, TICKS, Day, rate, ticks

from omni_placement.economy import Costs, Rule
from omni_placement.layout import Topology
from omni_placement.load import LoadRules

DAY = Day(num_layers=1, num_experts=16, tokens_per_step=2048, bursts=4)
TOPOLOGY = Topology(1, 16, 4, 5, expert_bytes=44_000_000)
COSTS = Costs(ms_per_token=0.0008)


def test_a_seed_gives_the_same_day_and_another_one_another() -> None:
    first, again, other = (next(ticks(replace(DAY, seed=seed))).steps.tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_rates_follow_the_clock_and_never_exceed_the_capacity() -> None:
    by_name = {kind.name: kind for kind in CLASSES}
    assert rate(by_name["code"], 11) > 5 * rate(by_name["code"], 2)
    assert rate(by_name["agents"], 13.99) == 0 < rate(by_name["agents"], 14)
    # The course has no seam at midnight.
    assert all(abs(rate(kind, 23.999) - rate(kind, 0)) < 0.01 for kind in CLASSES if not kind.since_hour)
    assert max(sum(rate(kind, hour / 4) for kind in CLASSES) for hour in range(96)) <= 1.0


def test_counts_and_steps_are_of_the_same_load() -> None:
    """Over some ticks, the tokens counted are those of the steps sampled, and each layer sees the same number."""
    day = replace(DAY, num_layers=2, samples=8, clustering=0.0)
    counted, stepped = np.zeros((2, 16)), np.zeros((2, 16))
    for _, tick in zip(range(20), ticks(day), strict=False):
        counted += np.sum(list(tick.counts.values()), axis=0) / day.steps_per_tick
        stepped += tick.steps.mean(axis=0)
    np.testing.assert_allclose(stepped, counted, rtol=0.1)
    np.testing.assert_allclose(counted.sum(axis=1)[0], counted.sum(axis=1)[1], rtol=0.01)


def test_migrations_are_charged_alike_and_an_oracles_are_free() -> None:
    never, minutely, oracle = (
        replay(DAY, TOPOLOGY, each, COSTS) for each in (Never(), Every("greedy_lpt", 2, 2), Oracle("greedy_lpt"))
    )
    assert never.migration_ms == never.moved_bytes == 0
    assert minutely.publications == TICKS // 2
    assert minutely.migration_ms == pytest.approx(COSTS.migration_ms(minutely.rounds, TOPOLOGY.expert_bytes))
    assert oracle.migration_ms == 0 and oracle.plans == TICKS // 2
    assert never.even_ms == minutely.even_ms == oracle.even_ms
    assert oracle.expert_ms < minutely.expert_ms < never.expert_ms
    assert sum(minutely.moved_by_tick) == minutely.moved_bytes
    assert len(never.imbalance) == TICKS and min(never.imbalance) >= 1


def test_the_service_publishes_what_pays() -> None:
    """Against the same solver on a timer: fewer bytes and no more time; with endless costs nothing moves."""
    scene = Scene(DAY, TOPOLOGY, COSTS)
    outcomes = run(scene, ["60s/greedy_lpt", "service/greedy_lpt", "oracle", "service"], jobs=1)
    ours, timer = outcomes["service/greedy_lpt"], outcomes["60s/greedy_lpt"]
    assert ours.moved_bytes < 0.5 * timer.moved_bytes
    assert ours.total_ms < timer.total_ms
    assert sum(ours.reasons.values()) == ours.plans and ours.reasons["pays"] == ours.publications
    dear = replace(COSTS, stall_ms_per_round=1e9)
    assert replay(DAY, TOPOLOGY, Service("greedy_lpt", dear, LoadRules(), Rule()), dear).publications == 0


def test_every_named_system_can_be_built_and_plans_for_its_layout() -> None:
    tick = next(ticks(DAY))
    for name in TITLES:
        built, current = system(name, COSTS), start_layout(TOPOLOGY)
        for index in range(4):
            following = built.after(index, tick, current)
            current = following or current
        assert current.topology == TOPOLOGY


def test_report_says_where_the_service_does_not_win(tmp_path: Path) -> None:
    outcomes = run(Scene(DAY, TOPOLOGY, COSTS), ["never", "service", "oracle"], jobs=1)
    table = block_of(outcomes, scale=2.0).rows
    assert [line[0] for line in table] == [TITLES[name] for name in outcomes]
    assert table[0][5] == "0.0"
    [verdict] = verdicts(outcomes)
    assert "wins on time only" in verdict and "it moves nothing" in verdict
    json.dumps(as_json(outcomes))
    draw(tmp_path / "day.png", outcomes)
    assert (tmp_path / "day.png").stat().st_size > 10_000
