"""Workers that fail, fall silent or answer late, through the real wires: what the client sees, and what is left."""

import asyncio
import json
from typing import Any

import pytest

from omni_common.errors import Unavailable
from omni_proxy.health import Cause, HealthSettings

QUICK = {"stall_min_s": 1.0, "silence_s": 0.5, "same_event_s": 0.0, "ejection_s": 0.2, "ratio_min_legs": 1000}


def quick(**changes: Any) -> dict[str, Any]:
    return {"health": {**QUICK, **changes}}


async def answer(stack: Any, **changes: Any) -> str:
    response = await stack.chat(**changes)
    assert response.status_code == 200, response.text
    if not changes.get("stream"):
        return response.json()["choices"][0]["message"]["content"]
    lines = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
    assert lines[-1] == "[DONE]"
    choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def decodes(stack: Any) -> list[Any]:
    return [worker for name, worker in stack.workers.items() if name[0] == "d"]


async def held(stack: Any) -> tuple[Any, list[Any]]:
    """The decode worker that holds back tokens, and the others, which will not."""
    waits = [asyncio.ensure_future(worker.held.wait()) for worker in decodes(stack)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    (holder,) = [worker for worker in decodes(stack) if worker.live]
    others = [worker for worker in decodes(stack) if worker is not holder]
    for worker in others:
        worker.hold_after = None
    return holder, others


async def undisturbed(stack: Any, **changes: Any) -> str:
    for worker in decodes(stack):
        worker.resumed.set()
    said = await answer(stack, **changes)
    for worker in decodes(stack):
        worker.resumed.clear()
        worker.held.clear()
        worker.submits.clear()
    return said


async def test_a_burst_that_may_be_hedged_is_spread_like_any_other(start):
    hedged = {"enabled": True, "min_wait_ms": 60_000}
    stack = await start("p1 p2 p3 p4 d", {"hedging": hedged, "policy": "least_loaded"})
    gate = asyncio.Event()
    for name in ("p1", "p2", "p3", "p4"):
        stack[name].prefill_gate = gate
    body = {"model": "tiny", "prompt": [f"prompt {number}" for number in range(32)], "max_tokens": 2}
    asked = asyncio.create_task(stack.client.post("/v1/completions", json=body, timeout=30))
    for name in ("p1", "p2", "p3", "p4"):
        await asyncio.wait_for(stack[name].prefill_started.wait(), 10)
    gate.set()
    assert (await asked).status_code == 200
    await stack.until_settled()


def last_span(stack: Any) -> Any:
    return [span for span in stack.spans.get_finished_spans() if span.name == "proxy.request"][-1].attributes


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stream_leaves_a_decode_worker_that_has_gone_quiet(start, stream):
    stack = await start("p d1 d2", quick(), hold_after=9)
    plain = await undisturbed(stack)
    async with asyncio.timeout(20):
        request = asyncio.create_task(answer(stack, stream=stream))
        holder, _ = await held(stack)
        assert await request == plain
        assert await holder.aborted.get() == holder.submits[0].request_id
    assert stack.metric("omni_proxy_ejections_total", cause="silent") == 1
    assert stack.metric("omni_proxy_resumes_total") == 1
    await stack.until_settled()


async def test_patience_that_is_changed_holds_for_the_workers_that_are_there(start):
    stack = await start("p d1 d2", hold_after=9)
    stack.proxy.fleet.health.settings = HealthSettings.model_validate(QUICK)
    async with asyncio.timeout(20):
        request = asyncio.create_task(answer(stack))
        await held(stack)
        said = await request
    assert stack.metric("omni_proxy_resumes_total") == 1
    assert said == await undisturbed(stack)


async def test_a_worker_that_reports_may_be_late_for_longer(start):
    stack = await start("p d1 d2", quick(silence_s=100.0), hold_after=9)
    plain = await undisturbed(stack)
    request = asyncio.create_task(answer(stack))
    async with asyncio.timeout(20):
        holder, _ = await held(stack)
        done, _ = await asyncio.wait({request}, timeout=1.0)
        assert not done
        holder.resumed.set()
        assert await request == plain
    assert stack.metric("omni_proxy_resumes_total") == 0


async def gated(stack: Any) -> tuple[Any, Any]:
    """The prefill worker that was asked and does not answer, and the other one, which will."""
    prefills = [worker for name, worker in stack.workers.items() if name[0] == "p"]
    waits = [asyncio.ensure_future(worker.prefill_started.wait()) for worker in prefills]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    (late,) = [worker for worker in prefills if worker.prefill_started.is_set()]
    (other,) = [worker for worker in prefills if worker is not late]
    other.prefill_gate.set()
    return late, other


@pytest.mark.parametrize(
    ("settings", "metric"),
    [
        pytest.param(quick(), ("omni_proxy_retries_total", {"leg": "prefill"}), id="quiet"),
        pytest.param(
            {"hedging": {"enabled": True, "min_wait_ms": 30, "first_ratio": 0.001, "budget_ratio": 1.0}},
            ("omni_proxy_hedges_total", {"won": "second"}),
            id="hedged",
        ),
    ],
)
async def test_a_late_prefill_is_done_elsewhere(start, settings, metric):
    stack = await start("p1 p2 d", settings)
    plain = await answer(stack)
    before = stack.metric(metric[0], **metric[1])
    for name in ("p1", "p2"):
        stack[name].prefill_gate = asyncio.Event()
        stack[name].prefill_started.clear()
    async with asyncio.timeout(20):
        request = asyncio.create_task(answer(stack))
        late, other = await gated(stack)
        assert await request == plain
        assert await late.aborted.get() == late.prefills[-1].request_id
    assert stack.metric(metric[0], **metric[1]) == before + 1
    assert stack["d"].submits[-1].kv_handle.engine_id == other.worker_id
    await stack.until_settled()


async def test_a_hedge_that_loses_leaves_nothing(start):
    hedging = {"enabled": True, "min_wait_ms": 30, "first_ratio": 0.001, "budget_ratio": 1.0}
    stack = await start("p1 p2 d", {"hedging": hedging})
    for name in ("p1", "p2"):
        stack[name].prefill_gate = asyncio.Event()
    async with asyncio.timeout(20):
        request = asyncio.create_task(answer(stack))
        for name in ("p1", "p2"):
            await stack[name].prefill_started.wait()
        stack["p1"].prefill_gate.set()
        await request
        assert await stack["p2"].aborted.get() == stack["p2"].prefills[0].request_id
    await stack.until_settled()


async def test_a_hedge_that_fails_too_is_nobodys_win(start):
    hedging = {"enabled": True, "min_wait_ms": 30, "first_ratio": 0.001, "budget_ratio": 1.0}
    stack = await start("p1 p2 d", {"hedging": hedging})
    plain = await answer(stack)
    hedges = {won: stack.metric("omni_proxy_hedges_total", won=won) for won in ("first", "second")}
    for name in ("p1", "p2"):
        stack[name].prefill_gate, stack[name].gate_error = asyncio.Event(), Unavailable("died over it")
        stack[name].prefill_started.clear()
    async with asyncio.timeout(20):
        request = asyncio.create_task(answer(stack))
        for name in ("p1", "p2"):
            await stack[name].prefill_started.wait()
        for name in ("p1", "p2"):
            stack[name].prefill_gate.set()
        assert await request == plain
    assert {won: stack.metric("omni_proxy_hedges_total", won=won) for won in hedges} == hedges
    assert stack.metric("omni_proxy_hedges_total", won="neither") == 1
    await stack.until_settled()


async def test_what_is_counted_by_kind_begins_at_zero(start):
    """Prometheus' rate does not see the event that begins a series."""
    stack = await start("p d")
    page = (await stack.client.get("/metrics")).text
    for name, values in {
        "retries_total{leg": ("prefill", "decode"),
        "ejections_total{cause": Cause,
        "ejections_spared_total{cause": Cause,
        "hedges_total{won": ("first", "second", "neither"),
        "replays_total{end": ("same", "differs"),
    }.items():
        for value in values:
            assert f'omni_proxy_{name}="{value}"}} 0.0' in page


async def test_a_failing_worker_is_left_alone_and_returns(start):
    stack = await start("p1 p2 d", quick(ejection_s=0.5) | {"policy": "round_robin"})
    plain = await answer(stack)
    stack["p2"].prefills.clear()
    stack["p2"].prefill_error = Unavailable("away")
    async with asyncio.timeout(30):
        while stack.metric("omni_proxy_ejections_total", cause="consecutive_failures") == 0:
            assert {await answer(stack) for _ in range(2)} == {plain}
        refusals = {w["id"]: w["refusal"] for w in (await stack.client.get("/workers")).json()["workers"]}
        assert refusals["p2"] == "ejected: consecutive_failures"
        assert stack.metric("omni_proxy_retries_total", leg="prefill") == len(stack["p2"].prefills) == 3
        stack["p2"].prefill_error = None
        while len(stack["p2"].prefills) < 8:
            assert await answer(stack) == plain
    page = (await stack.client.get("/metrics")).text
    assert 'omni_proxy_worker_health{state="open"} 0.0' in page
    assert stack.metric("omni_proxy_retries_total", leg="prefill") == 3


async def test_decode_does_not_wait_for_blocks_of_a_worker_gone_quiet(start):
    stack = await start("p d", quick(alive_factor=1000.0), hold_after=1, report_s=0.05)
    plain = await undisturbed(stack)
    stack["p"].report_s = None
    async with asyncio.timeout(20):
        request = asyncio.create_task(answer(stack))
        assert await stack["d"].aborted.get() == stack["d"].submits[0].request_id
        stack["d"].resumed.set()
        assert await request == plain
    pulled, computed = stack["d"].submits
    assert (pulled.HasField("kv_handle"), computed.HasField("kv_handle")) == (True, False)
    assert stack.metric("omni_proxy_kv_releases_total") == 0, "decode may be reading: it ends the lease"
    assert stack.metric("omni_proxy_ejections_spared_total", cause="silent") == 1
    await stack.until_settled()


async def test_blocks_that_decode_may_be_reading_are_not_freed_when_the_client_leaves(start):
    stack = await start("p d", hold_after=1)
    async with asyncio.timeout(20):
        request = asyncio.create_task(answer(stack))
        await stack["d"].held.wait()
        request.cancel()
        assert await stack["d"].aborted.get() == stack["d"].submits[0].request_id
    await stack.until_settled()
    assert stack["d"].submits[0].HasField("kv_handle")
    assert stack.metric("omni_proxy_kv_releases_total") == 0


async def test_who_cannot_pull_the_blocks_computes_the_prompt(start):
    stack = await start("p d")
    plain = await answer(stack)
    stack["d"].pulls = False
    stack["d"].submits.clear()
    async with asyncio.timeout(20):
        assert await answer(stack) == await answer(stack, stream=True) == plain
    assert [submit.HasField("kv_handle") for submit in stack["d"].submits] == [True, False] * 2
    assert stack["p"].released == [request.request_id for request in stack["p"].prefills[1:]]
    await stack.until_settled()


async def test_blocks_stay_in_their_group_when_its_decode_worker_refuses(start):
    stack = await start("p d1 d2", groups={"p": "g1", "d1": "g1", "d2": "g2"})
    plain = await answer(stack)
    assert stack["d1"].submits[-1].HasField("kv_handle")
    stack["d1"].reject = ("RESOURCE_EXHAUSTED", "full", "")
    async with asyncio.timeout(20):
        assert await answer(stack) == plain
    assert [submit.HasField("kv_handle") for submit in stack["d2"].submits] == [False]
    assert stack["p"].released == [stack["p"].prefills[-1].request_id]
    await stack.until_settled()


async def test_blocks_are_for_one_decode_worker(start):
    """The first one may read them yet, and ends the lease when it has."""
    stack = await start("p d1 d2", hold_after=1)
    plain = await undisturbed(stack)
    async with asyncio.timeout(20):
        request = asyncio.create_task(answer(stack))
        holder, (other,) = await held(stack)
        holder.breaks.set()
        assert await request == plain
    assert (holder.submits[0].HasField("kv_handle"), other.submits[0].HasField("kv_handle")) == (True, False)
    assert stack.metric("omni_proxy_kv_releases_total") == 0
    await stack.until_settled()


@pytest.mark.parametrize(
    ("drawn", "is_replayed", "is_exact"),
    [
        pytest.param({"temperature": 0}, False, True, id="greedy"),
        pytest.param({"temperature": 1.0}, False, True, id="drawn"),
        pytest.param({"temperature": 1.0, "seed": 3}, True, True, id="seeded"),
        pytest.param({"temperature": 0, "presence_penalty": 0.5}, True, True, id="greedy, penalised"),
        pytest.param({"temperature": 1.0, "frequency_penalty": 0.5}, False, False, id="drawn, penalised"),
        pytest.param({"temperature": 1.0, "frequency_penalty": 0.5, "seed": 3}, True, True, id="seeded, penalised"),
    ],
)
@pytest.mark.parametrize("burst", [1, 4])
async def test_what_was_drawn_is_repeated_where_it_can_be(start, drawn, is_replayed, is_exact, burst):
    stack = await start("p d1 d2", hold_after=9, burst=burst)
    plain = await undisturbed(stack, **drawn)
    async with asyncio.timeout(20):
        request = asyncio.create_task(answer(stack, **drawn, logprobs=True, top_logprobs=1))
        holder, (other,) = await held(stack)
        holder.breaks.set()
        assert await request == plain
    resumed = other.submits[-1]
    assert (resumed.num_output_tokens == 0) is is_replayed
    assert resumed.num_output_tokens + resumed.sampling.max_tokens == 24
    await stack.until_settled()
    assert last_span(stack)["omni.resume_exact"] is is_exact
    assert stack.metric("omni_proxy_replays_total", end="same") == is_replayed
    assert stack.metric("omni_proxy_inexact_resumes_total") == (not is_exact)


async def test_a_replay_that_differs_goes_on_from_what_was_said(start):
    stack = await start("p d1 d2", hold_after=9)
    async with asyncio.timeout(20):
        request = asyncio.create_task(stack.chat(temperature=1.0, seed=3))
        holder, (other,) = await held(stack)
        other.offset = 5
        holder.breaks.set()
        response = await request
    assert response.json()["usage"]["completion_tokens"] == 24
    replayed, continued = other.submits
    assert (replayed.num_output_tokens, continued.num_output_tokens) == (0, 9)
    async with asyncio.timeout(5):
        assert await other.aborted.get() == replayed.request_id
    await stack.until_settled()
    assert last_span(stack)["omni.resume_exact"] is False
    assert stack.metric("omni_proxy_replays_total", end="differs") == 1


async def test_a_stream_that_gets_on_may_break_often(start):
    stack = await start("p d1 d2", {"max_attempts": 2}, hold_after=3)
    plain = await undisturbed(stack)
    request = asyncio.create_task(answer(stack))
    async with asyncio.timeout(20):
        for _ in range(5):
            waits = [asyncio.ensure_future(worker.held.wait()) for worker in decodes(stack)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            (holder,) = [worker for worker in decodes(stack) if worker.live]
            for worker in decodes(stack):
                worker.hold_after += 4
                worker.held.clear()
            holder.live.clear()
            holder.breaks.set()
            for wait in waits:
                wait.cancel()
        for worker in decodes(stack):
            worker.resumed.set()
        assert await request == plain
    assert stack.metric("omni_proxy_resumes_total") == 5
    await stack.until_settled()


async def test_a_process_that_loads_at_a_known_address_gets_no_work(start):
    stack = await start("d1 d2", {"connect_timeout_s": 0.2}, report_s=0.02)
    plain = await answer(stack)
    member = stack.proxy.fleet.get("d1")
    stack["d1"].is_loading = True
    stack["d1"].epoch = 2
    async with asyncio.timeout(10):
        while member.refusal is None:
            await stack.proxy.fleet.changed()
        assert member.refusal == "unreachable"
        for worker in decodes(stack):
            worker.submits.clear()
        assert {await answer(stack) for _ in range(4)} == {plain}
        assert not stack["d1"].submits
        stack["d1"].is_loading = False
        while stack.proxy.fleet.get("d1").worker.epoch != 2 or stack.proxy.fleet.get("d1").refusal is not None:
            await stack.proxy.fleet.changed()
