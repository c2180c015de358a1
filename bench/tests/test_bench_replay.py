import asyncio
import json
import math
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from livereplay.client import Answer, Order, body_of, replay
from livereplay.figures import Promise, median_error, point_of
from livereplay.report import order_of, simulated_goodputs
from livereplay.run import knee_of, system_of
from livereplay.workload import Prompt, Workload, read_workload

from omni_proxy.schedule_config import ScheduleConfig

BENCH = Path(__file__).parents[1]


def row(at_s: float, length: int, ids: list[int], output: int = 320) -> dict[str, object]:
    return {"timestamp": at_s * 1e3, "input_length": length, "output_length": output, "hash_ids": ids}


TRACE = [
    row(0, 1000, [0, 1]),
    row(3, 1600, [0, 2, 3, 4]),
    row(6, 1500, [0, 1, 5]),
    row(9, 100, [0]),
    row(12, 60_000, [0, 9, *range(100, 216)]),
    row(15, 2000, [0, 2, 3, 6], output=1),
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, TRACE)))
    return path


def test_a_workload_is_the_trace_made_smaller(trace: Path) -> None:
    workload = read_workload(trace, 9, 16, 4000)
    assert (workload.conversations, workload.left_out, workload.block_tokens) == (4, 0, 32)
    assert [p.tokens for p in workload.prompts] == [62, 100, 93, 6, 3750, 125]
    assert [p.output_tokens for p in workload.prompts] == [20, 20, 20, 20, 20, 2]
    small = read_workload(trace, 9, 16, 400)
    assert (small.conversations, small.left_out, len(small.prompts)) == (3, 1, 5)
    # A conversation comes whole or not at all.
    assert [p.hash_ids[1] for p in read_workload(trace, 1, 16, 400).prompts] == [1, 1]
    with pytest.raises(ValueError, match="fits 6 tokens"):
        read_workload(trace, 9, 16, 6)


def test_equal_ids_are_equal_tokens_of_one_salt(trace: Path) -> None:
    workload = read_workload(trace, 9, 16, 4000)
    first, second, again, *_, last = workload.prompts
    one, other, turn, end = (workload.token_ids(p, "a") for p in (first, second, again, last))
    assert [len(ids) for ids in (one, other, turn)] == [62, 100, 93]
    assert one == turn[:62]
    assert one[:32] == other[:32]
    assert one[32:64] != other[32:62]
    assert other[:96] == end[:96]
    assert other[96:100] != end[96:100]
    assert workload.token_ids(first, "b")[:32] != one[:32]


def test_the_best_hit_rate_counts_whole_blocks(trace: Path) -> None:
    workload = read_workload(trace, 9, 16, 400)
    # 62 of block 0; 100: 1 block of 3; 93: 1 of 2, the second was cut before; 6: none; 125: 3 blocks.
    assert workload.best_hit_rate() == pytest.approx(32 * (1 + 1 + 3) / (62 + 100 + 93 + 6 + 125))
    assert workload.best_hit_rate(3) == pytest.approx(32 * 3 / (6 + 125))


@settings(deadline=None)
@given(rate=st.floats(0.5, 50), seed=st.integers(0, 9))
def test_arrivals_keep_order_and_rate(rate: float, seed: int) -> None:
    workload = Workload(tuple(Prompt(3.0 * (i // 4), 10, 2, (0,)) for i in range(40)), 32, 0, 0)
    arrivals = workload.arrivals_s(rate, seed)
    assert arrivals == sorted(arrivals)
    assert arrivals[0] == 0
    assert 39 / arrivals[-1] == pytest.approx(rate)
    assert arrivals == workload.arrivals_s(rate, seed)


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def event(value: dict[str, object]) -> bytes:
    return chunk(b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n")


@asynccontextmanager
async def server(status: str, tokens: int, said: int) -> AsyncIterator[tuple[int, list[bytes]]]:
    """Answers each request with an empty event, `tokens` tokens in as many writes, and a usage that says `said`."""
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
        asked.append(await reader.readexactly(length))
        writer.write(f"HTTP/1.1 {status}\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        writer.write(event({"choices": [{"text": ""}]}))
        for _ in range(tokens):
            writer.write(event({"choices": [{"text": "x"}]}))
            await writer.drain()
            await asyncio.sleep(0)
        usage = {"completion_tokens": said, "prompt_tokens_details": {"cached_tokens": 48}}
        writer.write(event({"choices": [], "usage": usage}) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        await writer.drain()
        await reader.read()
        writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1], asked


@pytest.mark.parametrize(
    ("status", "said", "error"),
    [
        pytest.param("200 OK", 5, "", id="whole"),
        pytest.param("200 OK", 4, "another length", id="short"),
        pytest.param("429 Too Many Requests", 5, "HTTP/1.1 429 Too Many Requests", id="refused"),
    ],
)
async def test_an_answer_counts_where_it_is_whole(status: str, said: int, error: str) -> None:
    heard: list[int] = []
    async with server(status, 5, said) as (port, asked):
        orders = [Order(at_s, body_of("m", [1, 2, 3], 5), 3, 5) for at_s in (0.0, 0.01)]
        answers = await replay(port, orders, heard.append, 10.0)
    assert heard == [0, 1]
    assert [answer.error for answer in answers] == [error, error]
    assert json.loads(asked[0]) | {"prompt": [1, 2, 3], "max_tokens": 5} == json.loads(asked[0])
    if not error:
        assert all(answer.cached_tokens == 48 and 0 < answer.ttft_ms <= answer.last_ms for answer in answers)
        assert all(sum(answer.gaps_ms) == pytest.approx(answer.last_ms - answer.ttft_ms) for answer in answers)


async def test_nobody_there_is_an_error_of_the_request() -> None:
    async with server("200 OK", 1, 1) as (port, _):
        pass
    [answer] = await replay(port, [Order(0.0, b"{}", 3, 1)], lambda _: None, 5.0)
    assert answer.error == "ConnectionRefusedError"


def samples(model: str, counts: dict[str, int]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    name = "omni_proxy_prediction_error_ratio_bucket"
    return {(name, (("le", le), ("model", model))): float(count) for le, count in counts.items()}


@pytest.mark.parametrize(
    ("before", "after", "median"),
    [
        ({}, {"0.1": 10, "0.2": 10, "+Inf": 10}, 0.05),
        ({"0.1": 10, "0.2": 10, "+Inf": 10}, {"0.1": 10, "0.2": 30, "+Inf": 30}, 0.15),
        ({}, {"0.1": 1, "0.2": 2, "+Inf": 10}, 0.2),
        ({"0.1": 1, "+Inf": 1}, {"0.1": 1, "+Inf": 1}, math.nan),
        ({}, {}, math.nan),
    ],
)
def test_the_median_of_a_histogram_between_two_scrapes(before: Any, after: Any, median: float) -> None:
    found = median_error(samples("step", before), samples("step", after), "step")
    assert found == pytest.approx(median, nan_ok=True)


def test_what_failed_keeps_no_promise() -> None:
    answers = [
        Answer(100, 11, ttft_ms=50, last_ms=150, gaps_ms=[10.0] * 10, cached_tokens=50),
        Answer(100, 11, ttft_ms=500, last_ms=600, gaps_ms=[10.0] * 10),
        Answer(100, 11, ttft_ms=50, last_ms=2050, gaps_ms=[200.0] * 10),
        Answer(100, 1, ttft_ms=50, last_ms=50),
        Answer(100, 11, error="timeout"),
    ]
    point = point_of(answers, 2.0, Promise(100.0, 100.0), {}, {})
    assert (point.requests, point.failed, point.offered_per_s) == (5, 1, 2.5)
    assert point.kept == pytest.approx(2 / 5)
    assert point.goodput == pytest.approx(1.0)
    assert (point.ttft_p50_ms, point.ttft_p90_ms, point.itl_p99_ms) == (50, 500, 200)
    assert point.itl_mean_ms == pytest.approx((10 + 10 + 200) / 3)
    assert point.hit_rate == pytest.approx(50 / 400)


@pytest.mark.parametrize(
    ("sweep", "knee"),
    [
        ([(2, 1.0), (4, 0.95), (8, 0.85)], 6.0),
        ([(2, 0.8)], 1.0),
        ([(2, 1.0), (4, 0.9)], 4.0),
    ],
)
def test_the_knee_lies_between_two_rates(sweep: list[tuple[float, float]], knee: float) -> None:
    assert knee_of(sweep) == pytest.approx(knee)


def test_the_order_of_two_runs_is_compared_where_both_are_sure() -> None:
    live = {"a": [9.0, 9.5], "b": [5.0, 6.0], "c": [5.5, 7.0], "d": [1.0, 1.1], "only here": [3.0]}
    simulated = {"a": [4.0, 4.5], "b": [3.0, 3.1], "c": [2.0, 2.1], "d": [3.5, 3.6], "only there": [9.0]}
    order = order_of(live, simulated)
    assert list(order.live) == ["a", "c", "b", "d"]
    assert list(order.simulated) == ["a", "d", "b", "c"]
    assert set(order.agreed) == {("a", "b"), ("a", "c"), ("a", "d")}
    assert set(order.reversed) == {("b", "d"), ("c", "d")}
    assert order.unsure == 1
    assert sum(line.startswith("reversed") for line in order.lines) == 2


def test_goodputs_of_the_simulation_are_found_by_fleet_and_level() -> None:
    def level(title: str, kept: float) -> dict[str, object]:
        outcome = {"kept": {"fixed": kept, "scaled": 0.0}, "offered_per_s": 10.0}
        return {"title": title, "scene": {"promise": {"name": "fixed"}}, "outcomes": {"cost": [outcome]}}

    fleets = [
        {"fleet": "8P8D", "levels": [level("knee", 0.5)]},
        {"fleet": "2P1D", "levels": [level("knee", 0.7), level("above", 0.4)]},
    ]
    assert simulated_goodputs({"fleets": fleets}, "2P1D", "above") == ("2P1D, above", {"cost": [4.0]})
    assert simulated_goodputs({"fleets": fleets}, "4P4D", "below") == ("8P8D, knee", {"cost": [5.0]})


@pytest.mark.parametrize(
    ("name", "holds"), [("cost", True), ("cost/no-hold", False), ("lpt", False), ("lpt/hold", True)]
)
def test_a_system_is_a_scheduler_file_that_the_proxy_takes(name: str, holds: bool) -> None:
    system = system_of(name)
    assert system.holds is holds
    config = ScheduleConfig.parse(json.dumps(system.config(Promise(500.0, 50.0))).encode())
    assert config.policy.name == name.partition("/")[0]
    assert (config.slo.ttft_ms, config.slo.itl_ms) == (500.0, 50.0)
    assert (config.flow.lookahead_ms > 1e9) is not holds


@pytest.mark.parametrize("name", ["best", "cost/held"])
def test_an_unknown_system_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"known|hold"):
        system_of(name)


@pytest.mark.stack
@pytest.mark.timeout(240)
def test_the_command_measures_a_stack_of_simulated_engines(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [
        row(3 * (i // 3), 4000 + 400 * (i % 7), [0, i % 5, *range(10 * (i % 5), 10 * (i % 5) + 8)]) for i in range(30)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(BENCH / "replay.py"), "--trace", str(trace), "--engine", "sim", "--quick"]
    command += ["--systems", "round_robin,cost", "--knee", "20", "--json", str(figures)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(figures.read_text())["levels"]["knee"]
    for points in found.values():
        assert points[0]["failed"] == 0
        assert 0.5 < points[0]["hit_rate"] < 1
        assert points[0]["errors"]["prefill"] > 0
    assert set(found) == {"cost", "round_robin"}
