"""The parts of the proxy's benchmark that figures rest on: reading, step frames, arithmetic. No process is started."""

import asyncio
import json
import os
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxyload.caches import _chain, line_ns
from proxyload.client import Plan, Seen, Stream, text_of
from proxyload.processes import Cores, Marks
from proxyload.reference import events_of
from proxyload.relay import Answer
from proxyload.report import added, cost_of, tables
from proxyload.runs import Point, Results, Wishes, point_of
from proxyload.worker import Running

from omni.decode.v1 import decode_service_pb2 as decode_pb
from omni.engine.v1 import engine_pb2
from omni_proxy.detokenize import ByteLevelDetokenizer
from omni_proxy.eager_send import EagerSend

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class Connection:
    """What a stream needs of a transport."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.requests.append(data)


def answer_of(texts: list[str]) -> bytes:
    events, end = events_of({"model": "m", "texts": texts})
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in [*events, end])
    return HEAD + chunks + b"0\r\n\r\n"


def stream_of(texts: list[str], failed: "asyncio.Future[None]") -> tuple[Stream, Seen, Connection]:
    seen, connection = Seen(begin_s=0.0), Connection()
    stream = Stream(Plan(lambda _: b"ask", len(texts), "".join(texts), lambda: 0.0, lambda: len(texts)), seen, failed)
    stream.connection_made(cast(asyncio.Transport, connection))
    stream.begin()
    return stream, seen, connection


@given(texts=st.lists(st.text(max_size=8), min_size=1, max_size=6), size=st.integers(1, 300))
async def test_an_answer_is_counted_and_checked_however_it_is_cut(texts: list[str], size: int) -> None:
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    stream, seen, connection = stream_of(texts, failed)
    answer = answer_of(texts)
    for _ in range(2):
        for start in range(0, len(answer), size):
            stream.data_received(answer[start : start + size])
    assert not failed.done()
    assert (seen.answers, seen.wrong_answers, connection.requests) == (2, 0, [b"ask"] * 3)
    assert seen.events == seen.answer_events == seen.answer_tokens == 2 * len(texts)
    assert len(seen.ttft_ms) == 2
    assert text_of(answer) == "".join(texts)


async def test_another_text_is_a_wrong_answer() -> None:
    stream, seen, _ = stream_of(["a", "b"], asyncio.get_running_loop().create_future())
    stream.data_received(answer_of(["a", "b"]))
    stream.data_received(answer_of(["a", "c"]))
    assert (seen.answers, seen.wrong_answers) == (2, 1)


async def test_an_error_status_fails_the_run() -> None:
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    stream, _, _ = stream_of(["a"], failed)
    stream.data_received(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}\r\n")
    with pytest.raises(Exception, match="503"):
        failed.result()


async def test_the_relay_s_answer_is_what_the_client_counts_and_checks() -> None:
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    texts = ["a", "\N{SNOWMAN}", "\n"]
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    answer = Answer(EagerSend(send), ByteLevelDetokenizer([text.encode() for text in texts]))
    for token_id in range(len(texts)):
        answer.show(token_id)
    await answer.end()
    assert [message["type"] for message in sent] == ["http.response.start"] + ["http.response.body"] * 4
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(m["body"]), m["body"]) for m in sent[1:])
    stream, seen, _ = stream_of(texts, failed)
    for _ in range(2):
        stream.data_received(HEAD + chunks + b"0\r\n\r\n")
    assert not failed.done()
    assert (seen.answers, seen.wrong_answers, seen.events) == (2, 0, 6)


def submit(stream_id: int, tokens: int) -> decode_pb.SessionRequest:
    sampling = engine_pb2.Sampling(max_tokens=tokens)
    return decode_pb.SessionRequest(submit=decode_pb.Submit(stream_id=stream_id, sampling=sampling))


def test_the_worker_gives_every_sequence_its_tokens_in_order_and_an_end() -> None:
    running, got = Running([7, 8, 9]), dict[int, list[int]]()
    running.receive(submit(1, 4))
    frames = [running.first_tokens(1).step]
    running.receive(submit(2, 2))
    frames.append(running.first_tokens(2).step)
    while running.has_any:
        frames.append(running.step(len(frames) + 1).step)
    for frame in frames:
        for stream_id, token_id in zip(frame.stream_ids, frame.token_ids, strict=True):
            got.setdefault(stream_id, []).append(token_id)
    assert got == {1: [7, 8, 9, 7], 2: [7, 8]}
    assert [frame.frame for frame in frames] == [1, 2, 3, 4, 5]
    assert [s.stream_id for frame in frames for s in frame.starts] == [1, 2]
    assert [(f.frame, e.stream_id) for f in frames for e in f.finishes] == [(3, 2), (5, 1)]


def test_an_aborted_sequence_gets_nothing_more() -> None:
    running = Running([7])
    running.receive(submit(1, 4))
    running.receive(decode_pb.SessionRequest(abort=decode_pb.Abort(stream_ids=[1])))
    assert not running.has_any and list(running.first_tokens(1).step.stream_ids) == []


def point(**figures: Any) -> Point:
    quantiles = {"p50": 0.0, "p99": 0.0}
    zeros: dict[str, Any] = dict.fromkeys(Point.__dataclass_fields__, 0.0)
    return Point(**(zeros | {"ttft_ms": quantiles, "itl_ms": quantiles} | figures))


def test_cpu_is_split_into_a_request_s_and_a_token_s_part() -> None:
    results = Results(load={("proxy", 64): [point(server_us_per_token=10 + 1000 / 100)]})
    results.short = [point(server_us_per_token=10 + 1000 / 10)]
    wishes = Wishes((64,), 1, 0, 0, 100, 10, cast(Any, None), Cores(0, 0, 0), cast(Any, None), print)
    assert cost_of(results, wishes) == pytest.approx((1000, 10))


def test_added_latency_pairs_windows_of_a_round() -> None:
    direct = [point(ttft_ms={"p50": v}) for v in (1.0, 5.0, 1.0)]
    proxy = [point(ttft_ms={"p50": v}) for v in (2.0, 6.1, 2.2)]
    assert added({"direct": direct, "proxy": proxy}, "ttft", "p50") == pytest.approx(1.1)


def test_the_relay_splits_what_is_added() -> None:
    ways = {
        "direct": [point(ttft_ms={"p50": v, "p99": v}) for v in (1.0, 5.0)],
        "relay": [point(ttft_ms={"p50": v, "p99": v}) for v in (1.5, 5.5)],
        "proxy": [point(ttft_ms={"p50": v, "p99": v}, server_us_per_token=100.0) for v in (3.5, 7.5)],
    }
    rows = {row[1]: row[2:] for row in tables(Results(latency={"one worker": ways}))["Latency at a low load"]}
    assert rows["added by the relay"][0] == "+0.50"
    assert rows["added by the proxy beyond the relay"][0] == "+2.00"
    assert rows["added by the proxy"][0] == "+2.50"
    assert rows["through the proxy"][-1] == "3.2"


def test_requests_are_shown_by_the_time_between_them() -> None:
    ways = {way: [point(ttft_ms={"p50": ms}, server_us_per_token=1e3 * ms)] for way, ms in
            (("direct", 0.3), ("relay", 0.7), ("proxy", 1.8))}  # fmt: skip
    table = tables(Results(gaps={10: ways}, line_ns={10: [90.0, 110.0]}))["A request by the time since the one before"]
    assert table[1:] == [("10", "0.30", "0.70", "1.80", "0.70", "1.80", "100")]


def test_a_line_read_again_takes_a_positive_time_and_leaves_the_process_where_it_was() -> None:
    allowed = os.sched_getaffinity(0)
    assert line_ns(min(allowed), 0.0, 3) > 0
    assert os.sched_getaffinity(0) == allowed


def test_the_chain_goes_through_every_line_before_it_returns() -> None:
    chain, at, seen = _chain(64), 0, set()
    for _ in range(64):
        seen.add(at)
        at = int(chain[at])
    assert at == 0 and seen == set(range(0, 512, 8))


def test_a_window_s_figures_come_from_its_marks() -> None:
    begin = Marks(10.0, {"proxy": 1.0, "client": 5.0, "worker both": 2.0}, 100.0)
    end = Marks(12.0, {"proxy": 2.0, "client": 5.5, "worker both": 2.2}, 103.0)
    seen = {
        "tokens": 50_000, "window_s": 2.0, "tokens_per_event": 1.0, "client_cpu_s": 0.5, "answers": 3,
        "wrong_answers": 0, "connect_ms": {"max": 4.0}, "ttft_ms": {}, "itl_ms": {},
    }  # fmt: skip
    found = point_of(begin, end, seen)
    assert (found.tokens_per_s, found.server_us_per_token) == (25_000, pytest.approx(20))
    assert (found.server_share, found.worker_share, found.client_share) == pytest.approx((0.5, 0.1, 0.25))
    assert found.foreign_share > 0


def test_goals_are_held_against_the_worst_row() -> None:
    quick, slow = point(server_us_per_token=20.0), point(server_us_per_token=50.0)
    results = Results(load={("proxy", 1): [slow], ("proxy", 64): [quick], ("proxy", 512): [slow], ("asgi", 64): [slow]})
    assert [row[-1] for row in tables(results)["Goals"][1:]] == ["no"]
    results.load["proxy", 512] = [quick]
    assert [row[-1] for row in tables(results)["Goals"][1:]] == ["yes"]
    assert json.dumps(tables(results))
