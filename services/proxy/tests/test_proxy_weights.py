"""Workers of one name with different weights, as in the middle of an update: no blocks go between them."""

import asyncio
from typing import Any

import pytest

MODEL = "tiny"
OLD, NEW = {"": "1"}, {"": "2"}


async def completed(stack: Any, **body: Any) -> str:
    answer = await stack.client.post("/v1/completions", json={"model": MODEL, "prompt": "Hi", "max_tokens": 12} | body)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


@pytest.mark.parametrize("policy", ["cost", "round_robin", "least_uncached_tokens"])
async def test_legs_pair_where_weights_are_equal(start: Any, policy: str, caplog: pytest.LogCaptureFixture) -> None:
    weights = {"p1": OLD, "p2": NEW, "d1": OLD, "d2": NEW}
    stack = await start("p1 p2 d1 d2", {"policy": policy}, weights=weights)
    for _ in range(8):
        await completed(stack)
    handed = [
        (weights[submit.kv_handle.engine_id], weights[decode])
        for decode in ("d1", "d2")
        for submit in stack[decode].submits
        if submit.HasField("kv_handle")
    ]
    assert handed and all(prefill == decode for prefill, decode in handed)
    told = [r for r in caplog.records if "other weights" in r.message]
    assert told and all(r.name_of_weights == MODEL for r in told)


async def test_legs_of_an_adapter_pair_where_its_weights_are_equal(start: Any) -> None:
    weights = {"p": {"": "1", "x": "a", "y": "a"}, "d1": {"": "1", "x": "b", "y": "a"}, "d2": {"": "1", "x": "a"}}
    stack = await start("p d1 d2", adapters={"p": {"x", "y"}, "d1": {"x", "y"}, "d2": {"x"}}, weights=weights)
    for _ in range(4):
        await completed(stack, model="x")
        await completed(stack, model="y")
        await completed(stack)
    handed = {(name, s.adapter) for name in ("d1", "d2") for s in stack[name].submits if s.HasField("kv_handle")}
    assert handed >= {("d2", "x"), ("d1", "y")}
    assert ("d1", "x") not in handed
    assert {adapter for _, adapter in handed} == {"", "x", "y"}


async def test_a_prompt_is_counted_where_it_will_be_computed(start: Any) -> None:
    stack = await start("p1 d1", weights={"p1": NEW, "d1": OLD})
    fleet = stack.proxy.fleet
    assert [fleet.columns.get("d1")] == fleet.computing_slots().tolist()
    await completed(stack)
    assert not stack["p1"].touched


async def test_the_prefill_workers_token_counts_as_its_weights(start: Any) -> None:
    """The only decode worker of its weights drains while the prompt is computed."""
    gate = asyncio.Event()
    stack = await start("p d1 d2", weights={"p": OLD, "d1": OLD, "d2": NEW}, prefill_gate=gate)
    asked = asyncio.create_task(completed(stack, temperature=0))
    await stack["p"].prefill_started.wait()
    stack.proxy.fleet.get("d1").is_draining = True
    stack.proxy.fleet.signal()
    gate.set()
    await asked
    [submit] = stack["d2"].submits
    assert submit.num_output_tokens == 1 and not submit.HasField("kv_handle")
    assert stack.metric("omni_proxy_inexact_resumes_total") == 1


@pytest.mark.parametrize(("others", "is_exact"), [(OLD, True), (NEW, False)])
async def test_a_stream_that_goes_on_with_other_weights_is_told_apart(start: Any, others: Any, is_exact: bool) -> None:
    stack = await start("d1 d2", weights={"d1": OLD, "d2": others}, hold_after=3)
    asked = asyncio.create_task(completed(stack, temperature=0))
    held = {asyncio.create_task(stack[name].held.wait(), name=name) for name in ("d1", "d2")}
    (first,), rest = await asyncio.wait(held, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    (second,) = rest
    stack[second.get_name()].resumed.set()
    stack[first.get_name()].breaks.set()
    await asked
    assert stack[second.get_name()].submits[0].num_output_tokens == 3
    assert stack.metric("omni_proxy_inexact_resumes_total") == (not is_exact)
    second.cancel()
