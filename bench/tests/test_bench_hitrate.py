import json
from pathlib import Path

import pytest
from sidebyside.tables import markdown
from tracereplay.knowledge import VARIANTS, Index, Oracle, OracleAhead, OwnHistory
from tracereplay.replay import Replay, Scene
from tracereplay.results import Source, block_of, cases_of, goals, run
from tracereplay.trace import BLOCK_TOKENS, Request, best_hit_rate, chained, read_trace, reusable
from tracereplay.worker import TimeModel

from omni_engine.ports import BlocksRemoved, BlocksStored


def conversations(users: int, turns: int, gap_s: float) -> list[dict[str, object]]:
    """Every turn repeats the one before and adds two blocks; all begin with the same block."""
    lines = []
    for turn in range(turns):
        for user in range(users):
            ids = [0, *(1 + user * 1000 + block for block in range(2 * (turn + 1)))]
            lines.append(
                {
                    "timestamp": round((turn * gap_s + user * gap_s / users) * 1000),
                    "input_length": len(ids) * BLOCK_TOKENS - 12,
                    "output_length": 100,
                    "hash_ids": ids,
                }
            )
    return lines


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, conversations(users=13, turns=6, gap_s=6.0))) + "\n")
    return path


def test_keys_are_chained_and_stop_at_the_last_full_block(trace: Path) -> None:
    first, *_ = requests = read_trace(trace)
    assert len(requests) == 78
    assert [len(r.keys) for r in requests[::13]] == [2, 4, 6, 8, 10, 12]
    assert chained([1, 2])[0] == chained([1, 3])[0]
    assert chained([1, 3])[1] != chained([2, 3])[1]
    assert reusable(first) == 2
    assert reusable(Request(0.0, 2 * BLOCK_TOKENS, 1, chained([1, 2]))) == 1
    assert [r.at_s for r in read_trace(trace, limit=2, speed=2.0)] == [0.0, 0.231]


def test_least_possible_misses_are_those_of_an_endless_cache() -> None:
    keys = chained([1, 2, 3])
    requests = [Request(0.0, 3 * BLOCK_TOKENS + 1, 1, keys), Request(1.0, 3 * BLOCK_TOKENS + 1, 1, keys)]
    assert best_hit_rate(requests) == 3 * BLOCK_TOKENS / (2 * (3 * BLOCK_TOKENS + 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_replays_are_repeatable_and_account_for_every_token(trace: Path, variant: str) -> None:
    requests, scene = read_trace(trace), Scene(64, workers=3, spread_s=0.5, seed=3)
    outcome = Replay(scene, variant).run(requests)
    assert outcome == Replay(scene, variant).run(requests)
    assert 0 < outcome.hit_rate <= best_hit_rate(requests)
    assert 1 / 3 <= outcome.busiest <= 1


def test_who_knows_more_hits_more(trace: Path) -> None:
    requests, scene = read_trace(trace), Scene(100, workers=4, spread_s=0.0)
    rates = {variant: Replay(scene, variant).run(requests).hit_rate for variant in VARIANTS}
    assert rates["none"] < rates["index"]
    assert rates["index"] == pytest.approx(rates["oracle_ahead"], rel=0.02)


def test_marks_bridge_the_time_until_events_arrive() -> None:
    """A burst of one prompt: with marks it follows the first of it, and is not sprayed."""
    keys = chained(range(8))
    burst = [Request(0.0, 8 * BLOCK_TOKENS + 1, 10, keys) for _ in range(8)]
    scene = Scene(200, workers=8, spread_s=0.0, network_s=1.0)
    assert Replay(scene, "unmarked").run(burst).hit_rate == 0
    assert Replay(scene, "index").run(burst).hit_rate > 0.5
    assert Replay(scene, "oracle_ahead").run(burst).hit_rate > 0.5


def test_several_proxies_share_events_and_not_history(trace: Path) -> None:
    requests, scene = read_trace(trace), Scene(200, workers=4, proxies=3, spread_s=0.5)
    assert Replay(scene, "history").run(requests).hit_rate < Replay(scene, "index").run(requests).hit_rate


def test_a_request_that_no_cache_holds_is_refused() -> None:
    big = Request(0.0, 5 * BLOCK_TOKENS, 1, chained(range(5)))
    with pytest.raises(ValueError, match="6 blocks in a cache of 5"):
        Replay(Scene(5, workers=1), "none").run([big])
    with pytest.raises(ValueError, match="empty"):
        Replay(Scene(5), "none").run([])


def test_kinds_of_knowledge_hear_only_what_they_are_allowed() -> None:
    a, b, c = chained([1, 2, 3])
    positions = {a: 0, b: 1, c: 2}
    stored = [BlocksStored([key], None, (), BLOCK_TOKENS) for key in (a, b, c)]
    index, oracle = Index(2, 10, lambda: 0.0, marks_s=0.0), Oracle(2)
    for knowledge in (index, oracle):
        knowledge.changed(0, stored)
    assert [k.forecasts((a, b, c))(0).cached_tokens for k in (index, oracle)] == [0, 3 * BLOCK_TOKENS]
    index.reported(0, stored, positions)
    index.reported(0, [BlocksRemoved([c])], positions)
    assert [index.forecasts((a, b, c))(n).cached_tokens for n in (0, 1)] == [2 * BLOCK_TOKENS, 0]
    ahead = OracleAhead(1)
    ahead.dispatched(0, (a, b))
    forecast = ahead.forecasts((a, b, c))(0)
    assert (forecast.cached_tokens, forecast.expected_tokens) == (2 * BLOCK_TOKENS, 2 * BLOCK_TOKENS)
    ahead.prefilled(0, (a, b))
    assert ahead.forecasts((a, b, c))(0).cached_tokens == 0


def test_own_history_forgets_the_tails_of_the_oldest() -> None:
    old, new = chained([1, 2, 3]), chained([7, 8])
    history = OwnHistory(1, capacity_blocks=4)
    history.dispatched(0, old)
    history.dispatched(0, new)
    assert [history.forecasts(keys)(0).cached_tokens // BLOCK_TOKENS for keys in (old, new)] == [2, 2]


def test_results_keep_every_seed_and_judge_the_index(trace: Path) -> None:
    scene = Scene(0, workers=3, spread_s=0.5, times=TimeModel(ms_per_token=0.1))
    results = run(Source(trace, None, 1.0), cases_of(scene, (40, 60), None), seeds=2, jobs=1)
    assert [result.case.scene.cache_blocks for result in results] == [40, 60]
    assert all(len(outcomes) == 2 for result in results for outcomes in result.outcomes.values())
    assert len(goals(results)) == 2
    assert results[0].to_oracle(results[0].best_oracle) == 1.0
    assert "oracle" in markdown([block_of(results)], goals(results))
