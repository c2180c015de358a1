"""Every section of the benchmark, at sizes that take a moment."""

import asyncio
from typing import Any

import pytest
from prefixindex import redisserver
from prefixindex.goals import goals_of
from prefixindex.keys import measure_keys
from prefixindex.kvprocess import Load, measure_process
from prefixindex.others import Others
from prefixindex.population import populate
from prefixindex.redispath import RedisDuties, measure_redis
from prefixindex.replica import Duties, Wrong, check, measure_lookups, measure_memory
from prefixindex.report import blocks_of, last_lines
from prefixindex.sections import median_of
from sidebyside.tables import markdown

LENGTHS = (16, 1100)


def report(results: dict[str, Any], foreign: dict[str, float] | None = None) -> str:
    return markdown(blocks_of(results), last_lines(results, foreign or {}), heading="Goals")


@pytest.fixture(scope="module")
def has_redis() -> None:
    try:
        redisserver.program()
    except redisserver.NoRedis as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def replica_figures() -> dict[str, Any]:
    duties = Duties("lookups", 8000, 6, 1, 1100, LENGTHS, samples=9, budget_s=0.1, churn_blocks=3000)
    return {"workers": 6} | measure_lookups(duties)


def test_replica_is_measured_beside_the_dict(replica_figures: dict[str, Any]) -> None:
    rows = replica_figures["lookups"]
    assert {row["system"] for row in rows} == {"ours", "ours, all workers read", "dict"}
    assert {(row["kind"], row["blocks"]) for row in rows} == {(k, n) for k in ("spread", "own") for n in LENGTHS}
    assert all(0 < row["p50_us"] <= row["p99_us"] for row in rows)
    assert replica_figures["ours"]["entries"] == replica_figures["entries"]
    assert replica_figures["ours"]["blocks"] == replica_figures["blocks"] == 7 * 1100
    assert set(replica_figures["dict"]["events_per_s"]) == set(replica_figures["ours"]["events_per_s"])


def test_an_index_that_answers_wrongly_is_not_measured() -> None:
    population = populate(2000, 3, 1, spread=(3,), prompt_blocks=1000)
    with pytest.raises(Wrong):
        check(population, lambda keys: {"worker-000": 1}, LENGTHS)


def test_memory_is_measured_under_two_kinds_of_sharing() -> None:
    figures = measure_memory(Duties("memory", 2000, 70, 1, 500))
    assert figures["one holder"]["blocks"] == figures["three holders at random"]["blocks"] == 2000
    for kind in figures.values():
        assert kind["worst_bytes_per_entry"] >= kind["bytes_per_entry"] > 0


@pytest.mark.usefixtures("has_redis")
def test_redis_is_measured_beside_one_command_per_block(replica_figures: dict[str, Any]) -> None:
    duties = RedisDuties(4000, 6, 1, 1100, spread=(6, 3), lengths=LENGTHS, samples=6, budget_s=0.2)
    figures = asyncio.run(measure_redis(duties))
    ours = {(row["holders"], row["blocks"]): row for row in figures["lookups"] if row["system"] == "ours"}
    theirs = {(row["holders"], row["blocks"]): row for row in figures["lookups"] if row["system"] == "per block"}
    assert set(ours) == set(theirs) == {(holders, blocks) for holders in (6, 3, 2) for blocks in LENGTHS}
    for (_, blocks), row in theirs.items():
        assert row["commands_by_name"] == {"hkeys": blocks}
    for about, row in ours.items():
        assert row["round_trips"] == row["commands_by_name"]["evalsha"] == 1
        assert 1 < row["commands"] < theirs[about]["commands"]
    text = report({"replica": [replica_figures], "redis": [figures]}, {"redis": 0.25})
    assert "Through Redis" in text and "redis 25%" in text
    assert len(goals_of({"replica": [replica_figures], "redis": [figures]})) == 7


@pytest.mark.usefixtures("has_redis")
@pytest.mark.parametrize(
    "load",
    [
        pytest.param(Load("decode", "decode", workers=2, batches=10, watches=2), id="as fast as it goes"),
        pytest.param(Load("paced", "decode", workers=2, batches=10, watches=1, interval_s=0.01), id="paced"),
    ],
)
def test_every_event_reaches_every_watch(load: Load) -> None:
    figures = measure_process(load, seed=1, profile=not load.interval_s)
    assert figures["blocks"] == 2 * (10 + 2) * 32
    assert (figures["resyncs"], figures["told_share"]) == (0, 1.0)
    assert figures["events_per_s"] > 0
    assert (figures["delay"] is not None) == bool(load.interval_s)
    assert ("profile" in figures) == (not load.interval_s)
    rows = [{"name": load.name, "runs": [figures], "median": median_of([figures]), "profile": figures.get("profile")}]
    assert load.name in report({"process": rows})


def test_keys_of_a_second_turn_hash_its_tail_alone() -> None:
    figures = measure_keys(8192, 1024, 5, 0.5, seed=1)
    assert figures["list"]["hashed_blocks"] == figures["array"]["hashed_blocks"] == 64
    assert "8,192 tokens" in report({"keys": figures})


def test_medians_reach_into_mappings_and_leave_text_alone() -> None:
    runs = [{"name": "a", "rate": n, "cpu": {"redis": 2 * n}, "delay": None} for n in (1, 5, 3)]
    assert median_of(runs) == {"name": "a", "rate": 3, "cpu": {"redis": 6}, "delay": None}


def test_own_work_is_not_that_of_others() -> None:
    others = Others()
    assert sum(range(100_000)) > 0
    assert 0 <= others.share() <= 1
