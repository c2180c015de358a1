"""LoRA adapters: named as a model, served by those workers that have them, kept apart from the model itself."""

import asyncio
import json
from typing import Any

import pytest

from omni_common.blocks import block_keys, root_key
from omni_proxy.adapters import KnownAdapters

MODEL = "tiny"
MESSAGES = [{"role": "user", "content": "Tell a story"}]
QUICK = {"connect_timeout_s": 0.2}
"""Workers given by address are asked again so soon."""


async def until(stack: Any, condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await stack.proxy.fleet.changed()


async def models(stack: Any) -> list[str]:
    return [model["id"] for model in (await stack.client.get("/v1/models")).json()["data"]]


async def workers(stack: Any) -> dict[str, dict[str, Any]]:
    return {worker["id"]: worker for worker in (await stack.client.get("/workers")).json()["workers"]}


async def completed(stack: Any, **body: Any) -> dict[str, Any]:
    answer = await stack.client.post("/v1/completions", json={"model": MODEL, "prompt": "Hi", "max_tokens": 4} | body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


# Names


async def test_adapters_are_models_whose_parent_is_the_model(start):
    stack = await start("p d", {"model_aliases": ("alias",)}, adapters={"p": {"b", "a", "alias"}, "d": {"a"}})
    assert await models(stack) == [MODEL, "alias", "a", "b"]
    one = (await stack.client.get("/v1/models/a")).json()
    assert (one["root"], one["parent"], one["max_model_len"]) == ("a", MODEL, 256)
    assert (await stack.client.get("/v1/models/alias")).json()["parent"] is None, "the model's names come first"
    assert (await stack.client.get("/v1/models/c")).status_code == 404


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/kv/prefix"])
async def test_every_body_may_name_one(start, path):
    stack = await start("d", adapters={"d": {"org/sql:2"}})
    body = {"messages": MESSAGES}
    if path == "/detokenize":
        body = {"tokens": [5, 6]}
    elif path == "/v1/completions":
        body = {"prompt": "Hi"}
    for model, status in (("org/sql:2", 200), ("other", 404), ("", 404)):
        answer = await stack.client.post(path, json={"model": model, "max_tokens": 2} | body)
        assert answer.status_code == status, answer.text
        assert status == 200 or answer.json()["error"]["code"] == "model_not_found"


def test_names_that_nobody_serves_are_forgotten_in_order():
    forgotten: list[str] = []
    known = KnownAdapters(most=3, on_forgotten=forgotten.append)
    known.told({"a"})
    known.told({"b"})
    known.told({"a", "c"})
    known.told(set())
    assert known.served == set() and all(name in known for name in "abc")
    known.told({"d"})
    assert "b" not in known and all(name in known for name in "acd") and forgotten == ["b"]
    known.told({"1", "2", "3", "4", "5"})
    assert all(name in known for name in "12345") and "a" not in known, "what is served is never forgotten"


def test_an_adapter_that_nobody_can_ask_for_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    known = KnownAdapters(taken=("tiny", "gpt"))
    for served in (["gpt", "poet"], ["gpt", "poet", "sql"], ["gpt", "tiny"]):
        known.told(frozenset(served))
    told = [getattr(record, "adapter", None) for record in caplog.records]
    assert told == ["gpt", "tiny"]


# A request's way


@pytest.mark.parametrize("policy", ["least_uncached_tokens", "cost"])
async def test_both_legs_have_it_and_say_so(start, policy):
    stack = await start("p d", {"policy": policy}, adapters={"p": {"sql"}, "d": {"sql"}})
    answer = await stack.client.post(
        "/v1/chat/completions",
        json={"model": "sql", "messages": MESSAGES, "max_tokens": 24, "temperature": 0},
        headers={"x-omni-explain": "1"},
    )
    assert answer.status_code == 200 and answer.json()["model"] == "sql"
    order, submit = stack["p"].prefills[0], stack["d"].submits[0]
    assert (order.adapter, order.model, submit.adapter, submit.model) == ("sql", MODEL, "sql", MODEL)
    assert order.block_keys == block_keys(list(order.token_ids), 7, root_key(MODEL, "sql"))
    assert json.loads(answer.headers["x-omni-decision"])["adapter"] == "sql"
    await stack.until_settled()
    page = (await stack.client.get(f"/decisions/{answer.headers['x-request-id']}")).json()
    assert page["adapter"] == "sql" and page["sequences"][0]["decisions"][0]["predicted"]["adapter_ms"] == 0
    [root] = [span for span in stack.spans.get_finished_spans() if span.name == "proxy.request"]
    assert (root.attributes["omni.adapter"], root.attributes["omni.model"]) == ("sql", MODEL)
    assert stack.metric("omni_proxy_adapter_requests_total", adapter="sql") == 1
    plain = await stack.chat(temperature=0)
    assert plain.json()["choices"] != answer.json()["choices"]
    assert plain.json()["model"] == MODEL and not stack["p"].prefills[1].adapter


async def test_a_stream_is_answered_in_its_name(start):
    stack = await start("d", adapters={"d": {"sql"}})
    answer = await stack.chat(model="sql", stream=True)
    assert {json.loads(line[6:])["model"] for line in answer.text.splitlines() if line.startswith("data: {")} == {"sql"}


async def test_only_those_that_serve_it_are_asked(start):
    serving = {"p2": {"x", "y"}, "d1": {"x"}, "d3": {"y"}}
    stack = await start("p1 p2 d1 d2 d3", adapters=serving)
    for _ in range(4):
        await completed(stack, model="x")
        await completed(stack, model="y")
        await completed(stack)
    for name, fake in stack.workers.items():
        named = {leg.adapter for leg in (*fake.prefills, *fake.submits)}
        assert named - {""} <= serving.get(name, set())
    assert {leg.adapter for leg in stack["d1"].submits} >= {"x"} and {leg.adapter for leg in stack["d3"].submits} >= {
        "y"
    }
    # Where no prefill worker serves it, decode computes the prompt.
    alone = await start("p1 d1", adapters={"d1": {"x"}})
    await completed(alone, model="x")
    assert not alone["p1"].prefills and alone["d1"].submits[0].adapter == "x"


async def test_those_that_have_it_in_a_slot_are_preferred(start):
    everywhere = {name: {"x", "y"} for name in ("p1", "p2", "p3", "d1", "d2", "d3")}
    slots = {"p2": {"x"}, "d3": {"x"}}
    stack = await start(
        "p1 p2 p3 d1 d2 d3", {"policy": "cost"}, adapters=everywhere, slots=slots, adapter_load_ms=5000.0
    )
    async with asyncio.timeout(10):
        while not {"p2", "d3"} <= {
            name for name, worker in (await workers(stack)).items() if worker["load"]["adapters"]
        }:
            pass
    for _ in range(6):
        await completed(stack, model="x")
    assert len(stack["p2"].prefills) + len(stack["d3"].submits) >= 6
    assert not any(stack[name].touched for name in ("p1", "p3", "d1", "d2"))
    one = (await workers(stack))["p2"]
    assert (one["adapters"], one["load"]["adapters"], one["adapter_load_ms"]) == (["x", "y"], ["x"], 5000.0)


async def test_its_blocks_are_its_own(start):
    stack = await start("d", adapters={"d": {"x", "y"}})
    prompt = list(range(5, 33))

    async def held(**body: Any) -> dict[str, Any]:
        found: dict[str, Any] = (await stack.client.post("/kv/prefix", json={"prompt": prompt} | body)).json()
        return found

    await completed(stack, model="x", prompt=prompt)
    assert (
        (await held(model="x"))["members"]["d"]
        != (await held())["members"]["d"]
        == (await held(model="y"))["members"]["d"]
    )
    assert (await held(model="x"))["block_keys"] == block_keys(prompt, 7, root_key(MODEL, "x")).hex()
    assert (await held())["block_keys"] == block_keys(prompt, 7, root_key(MODEL)).hex()
    await completed(stack, prompt=prompt)
    assert stack["d"].submits[1].uncached_tokens == len(prompt), "nothing of the adapter's counts as cached"


# They come and go


async def test_they_come_and_go_while_workers_stay(start):
    stack = await start("d", QUICK, adapters={"d": set()})
    assert (await stack.chat(model="late")).status_code == 404
    stack["d"].adapters["d"].add("late")
    fleet = stack.proxy.fleet
    await until(stack, lambda: "late" in fleet.adapters.served)
    assert (await stack.chat(model="late")).status_code == 200
    assert await models(stack) == [MODEL, "late"]
    stack["d"].adapters["d"].clear()
    await until(stack, lambda: not fleet.adapters.served)
    assert await models(stack) == [MODEL]
    assert (await stack.client.get("/v1/models/late")).status_code == 200, "it is known"

    waiting = asyncio.create_task(stack.chat(model="late"))
    others = [(await stack.chat()).status_code for _ in range(3)]
    refused = await waiting
    assert others == [200] * 3
    assert refused.status_code == 503 and refused.headers["x-omni-dropped-reason"] == "no_adapter"
    assert "'late'" in refused.json()["error"]["message"] and refused.headers["retry-after"] == "1"
    assert stack.metric("omni_proxy_dropped_total", reason="no_adapter") == 1

    waiting = asyncio.create_task(stack.chat(model="late"))
    stack["d"].adapters["d"].add("late")
    await until(stack, lambda: fleet.adapters.served)
    answered = await waiting
    assert answered.status_code in (200, 503), answered.text
    assert (await stack.chat(model="late")).status_code == 200


@pytest.mark.parametrize(("fleet", "lost"), [("p1 p2 d1", "p1 p2"), ("p1 d1 d2", "d1 d2"), ("d1 d2", "d1 d2")])
async def test_a_worker_that_lost_it_is_not_the_last_word(start, fleet, lost):
    everywhere = {name: {"x"} for name in fleet.split()}
    for loser in lost.split():
        stack = await start(fleet, adapters=everywhere, lost={loser: {"x"}})
        for _ in range(3):
            await completed(stack, model="x", max_tokens=6)
        await stack.until_settled()
        assert all(fake.live == {} for fake in stack.workers.values())
        # What a prefill computed is for the next decode worker: none computes it again.
        if fleet.startswith("p1 d1"):
            assert len(stack["p1"].prefills) == 3
            assert all(submit.HasField("kv_handle") for name in ("d1", "d2") for submit in stack[name].submits)


async def test_an_adapter_that_everybody_lost_is_an_error_of_the_workers(start):
    stack = await start("p d", adapters={"p": {"x"}, "d": {"x"}}, lost={"p": {"x"}, "d": {"x"}})
    assert (await stack.chat(model="x")).status_code in (502, 503)
    assert (await stack.chat()).status_code == 200
    await stack.until_settled()


async def test_a_stream_waits_for_the_only_one_that_serves_it(start):
    """Ejected for what broke it, and back after a while that nobody tells."""
    health = {"consecutive_failures": 1, "ejection_s": 0.5, "stall_min_s": 60.0}
    stack = await start(
        "p d1 d2", {"health": health, "resume_timeout_s": 20.0}, adapters={"p": {"x"}, "d1": {"x"}}, hold_after=4
    )
    async with asyncio.timeout(30):
        asked = asyncio.create_task(stack.chat(model="x", stream=True, max_tokens=12))
        await stack["d1"].held.wait()
        stack["d1"].resumed.set()
        stack["d1"].breaks.set()
        answer = await asked
    assert answer.text.endswith("data: [DONE]\n\n") and "error" not in answer.text
    assert len(stack["d1"].submits) == 2 and not stack["d2"].touched


async def test_a_stream_goes_on_where_it_is_served(start):
    stack = await start("d1 d2 d3", adapters={"d1": {"x"}, "d3": {"x"}}, hold_after=3)
    whole = await start("d", adapters={"d": {"x"}})
    expected = (await completed(whole, model="x", max_tokens=12, temperature=0))["choices"][0]["text"]
    asked = asyncio.create_task(completed(stack, model="x", max_tokens=12, temperature=0))
    held = [asyncio.create_task(stack[name].held.wait()) for name in ("d1", "d3")]
    await asyncio.wait(held, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    first, second = ("d1", "d3") if stack["d1"].held.is_set() else ("d3", "d1")
    stack[second].resumed.set()
    stack[first].breaks.set()
    assert (await asked)["choices"][0]["text"] == expected
    assert stack[second].submits[0].adapter == "x" and stack[second].submits[0].num_output_tokens == 3
    assert not stack["d2"].touched
    for task in held:
        task.cancel()
