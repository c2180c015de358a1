"""What the proxy expects of the workers' caches: marks of dispatched prompts, forecasts, the pages that show them."""

import asyncio
from collections import Counter
from typing import Any

import pytest

from omni_common.blocks import block_keys, root_key
from omni_common.errors import InvalidRequest, Unavailable
from omni_common.prefix_index import DISK, HBM, HOST, PrefixIndex
from omni_proxy.scheduling.forecast import Forecast, LoadCost, Outlook, reusable_tokens

BLOCK = 7
PROMPT = list(range(100, 200))
LIFE = {"prompts": 10, "prompt_tokens": 10_000, "prompt_busy_ms": 1_000.0}
"""Of workers that are no strangers, so that they get prompts before they have answered one."""


def completion(prompt: list[int], **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 8} | more


async def ask(stack: Any, prompt: list[int], **more: Any) -> Any:
    return await stack.client.post("/v1/completions", json=completion(prompt, **more))


async def known(stack: Any, prompt: list[int]) -> dict[str, dict[str, int]]:
    """Blocks per worker and tier, tiers that add nothing left out."""
    response = await stack.client.post("/kv/prefix", json={"prompt": prompt})
    assert response.status_code == 200, response.text
    page = response.json()
    result = {}
    for worker, reached in page["members"].items():
        steps = zip(page["tiers"], [0, *reached], reached, strict=False)
        result[worker] = {tier: after - before for tier, before, after in steps if after > before}
    return result


async def until_known(stack: Any, prompt: list[int], want: Any) -> None:
    async with asyncio.timeout(5):
        while (await known(stack, prompt)) != want:
            pass


def prefills(stack: Any) -> dict[str, int]:
    return {name: len(w.prefills) for name, w in stack.workers.items() if w.prefills}


async def burst(stack: Any, prompts: list[list[int]]) -> None:
    """All prompts at once, none answered before each has reached a worker."""
    gate = asyncio.Event()
    for worker in stack.workers.values():
        worker.prefill_gate = gate
    requests = [asyncio.create_task(ask(stack, prompt)) for prompt in prompts]
    async with asyncio.timeout(10):
        while sum(prefills(stack).values()) < len(prompts):
            await stack.client.get("/health")
        gate.set()
        assert {r.status_code for r in await asyncio.gather(*requests)} == {200}
    await stack.until_settled()


async def test_a_burst_of_one_prompt_stays_together(start):
    stack = await start("p1 p2 p3 p4 d", life=LIFE)
    await burst(stack, [PROMPT] * 8)
    assert prefills(stack) == {"p1": 8}
    assert stack.metric("omni_proxy_prefix_marks_running") == 0
    assert stack.metric("omni_proxy_prefix_marks_total", end="computed") == 8


async def test_a_burst_of_many_prompts_spreads(start):
    stack = await start("p1 p2 p3 p4 d", life=LIFE)
    await burst(stack, [[n] * 100 for n in range(8)])
    assert prefills(stack) == {"p1": 2, "p2": 2, "p3": 2, "p4": 2}


async def test_two_bursts_take_two_workers(start):
    stack = await start("p1 p2 d", life=LIFE)
    await burst(stack, [PROMPT, PROMPT[::-1]] * 4)
    assert prefills(stack) == {"p1": 4, "p2": 4}
    heads = {name: Counter(r.token_ids[0] for r in stack[name].prefills) for name in ("p1", "p2")}
    assert sorted(heads.values()) == sorted([Counter({100: 4}), Counter({199: 4})])


async def test_a_burst_leaves_a_worker_that_has_other_work(start):
    stack = await start("p1 p2 d", life=LIFE)
    tails = [PROMPT + [n] * 60 for n in range(6)]
    await burst(stack, tails)
    assert set(prefills(stack)) == {"p1", "p2"}


async def test_prompts_are_expected_while_they_are_computed_and_held_after(start):
    stack = await start("p d")
    stack["p"].prefill_gate = asyncio.Event()
    request = asyncio.create_task(ask(stack, PROMPT))
    await until_known(stack, PROMPT, {"p": {"expected": 14}, "d": {}})
    assert stack.metric("omni_proxy_prefix_marks_running") == 1
    stack["p"].prefill_gate.set()
    assert (await request).status_code == 200
    # Nobody else tells of these workers' blocks, so what they were seen to do counts.
    assert await known(stack, PROMPT) == {"p": {"hbm": 14}, "d": {"hbm": 14}}
    assert await known(stack, PROMPT[:50] + PROMPT[:50]) == {"p": {"hbm": 7}, "d": {"hbm": 7}}


@pytest.mark.parametrize("fleet", ["d", "b"])
async def test_decode_alone_is_expected_to_hold_the_prompt(start, fleet):
    stack = await start(fleet, hold_after=0)
    request = asyncio.create_task(ask(stack, PROMPT))
    await until_known(stack, PROMPT, {fleet: {"expected": 14}})
    stack[fleet].resumed.set()
    assert (await request).status_code == 200
    assert await known(stack, PROMPT) == {fleet: {"hbm": 14}}


async def test_a_mark_outlives_its_time_while_the_prefill_runs(start):
    stack = await start("p d", {"expected_ttl_s": 1.0})
    stack["p"].prefill_gate = asyncio.Event()
    request = asyncio.create_task(ask(stack, PROMPT))
    await until_known(stack, PROMPT, {"p": {"expected": 14}, "d": {}})
    loop = asyncio.get_running_loop()
    end = loop.time() + 1.7
    while loop.time() < end:
        assert await known(stack, PROMPT) == {"p": {"expected": 14}, "d": {}}
    stack["p"].prefill_gate.set()
    assert (await request).status_code == 200


@pytest.mark.parametrize("error", [Unavailable("away"), InvalidRequest("too long")], ids=str)
async def test_a_failed_prefill_withdraws_its_mark(start, error):
    stack = await start("p d")
    stack["p"].prefill_error = error
    await ask(stack, PROMPT)
    assert (await known(stack, PROMPT))["p"] == {}
    assert stack.metric("omni_proxy_prefix_marks_total", end="withdrawn") == 1


async def test_a_client_that_leaves_withdraws_its_mark_and_no_others(start):
    stack = await start("p d")
    stack["p"].prefill_gate = asyncio.Event()
    stays = asyncio.create_task(ask(stack, PROMPT))
    await until_known(stack, PROMPT, {"p": {"expected": 14}, "d": {}})
    longer = PROMPT + [5] * 14
    leaves = asyncio.create_task(ask(stack, longer))
    await until_known(stack, longer, {"p": {"expected": 16}, "d": {}})
    leaves.cancel()
    await until_known(stack, longer, {"p": {"expected": 14}, "d": {}})
    stack["p"].prefill_gate.set()
    assert (await stays).status_code == 200
    await stack.until_settled()


@pytest.mark.parametrize(
    ("cached", "result", "error"),
    [pytest.param(98, "exact", 0, id="exact"), pytest.param(70, "less", 28, id="less"), pytest.param(99, "more", 1)],
)
async def test_forecasts_are_compared_with_what_the_engine_says(start, cached, result, error):
    stack = await start("p d", cached_tokens=0)
    await ask(stack, PROMPT)
    assert stack.metric("omni_proxy_prefix_forecasts_total", result="exact") == 1
    stack["p"].cached_tokens = cached
    await ask(stack, PROMPT)
    assert stack.metric("omni_proxy_prefix_forecasts_total", result=result) == 1 + (result == "exact")
    assert stack.metric("omni_proxy_prefix_forecast_error_tokens_total", result=result) == error
    legs = [s for s in stack.spans.get_finished_spans() if s.name == "proxy.prefill"]
    assert [s.attributes["omni.predicted_cached_tokens"] for s in legs] == [0, 98]
    assert legs[1].attributes["omni.loadable_tokens"] == 0
    root = [s for s in stack.spans.get_finished_spans() if s.name == "proxy.request"][1]
    assert root.attributes["omni.predicted_cached_tokens"] == 98


async def test_the_next_turn_hashes_only_its_tail(start):
    stack = await start("p d", block_size=1)
    turn = list(range(10, 210))
    await ask(stack, turn[:150])
    hashed = stack.metric("omni_proxy_prefix_keys_total", source="hashed")
    await ask(stack, turn)
    assert stack.metric("omni_proxy_prefix_keys_total", source="reused") == 128
    assert stack.metric("omni_proxy_prefix_keys_total", source="hashed") - hashed == 72


async def test_the_pages_of_the_index(start):
    stack = await start("p d")
    await ask(stack, PROMPT)
    await ask(stack, PROMPT)
    summary = (await stack.client.get("/kv")).json()
    assert (summary["blocks"], summary["entries"], summary["block_sizes"]) == (14, 28, [BLOCK])
    assert (summary["age_s"], summary["position"], summary["degraded"]) == (None, None, False)
    assert {m["id"]: m["reported"] for m in summary["members"]} == {"p": False, "d": False}
    hottest = (await stack.client.get("/kv/hottest", params={"limit": 1})).json()["prefixes"]
    assert hottest == [{"block_key": hottest[0]["block_key"], "blocks": 14, "hits": 1, "members": ["d", "p"]}]
    page = (await stack.client.post("/kv/prefix", json={"prompt": PROMPT})).json()
    keys = block_keys(PROMPT, BLOCK, root_key("tiny"))
    assert (page["tokens"], page["block_size"], page["blocks"]) == (100, BLOCK, 14)
    assert page["block_keys"] == keys.hex()
    assert hottest[0]["block_key"] == keys[-16:].hex()
    assert page["tiers"] == ["hbm", "expected", "host", "disk", "remote"]
    assert page["members"] == {"p": [14] * 5, "d": [14] * 5}
    metrics = (await stack.client.get("/metrics")).text
    assert "omni_proxy_prefix_blocks 14.0" in metrics
    assert "omni_proxy_prefix_lookup_seconds_count 2.0" in metrics


async def test_a_prompt_is_the_same_as_text_messages_and_ids(start):
    stack = await start("p d")
    text = "Tell a story of blocks"
    messages = [{"role": "user", "content": text}]
    for body in ({"prompt": text}, {"messages": messages}):
        tokens = (await stack.client.post("/tokenize", json=body)).json()["tokens"]
        page = (await stack.client.post("/kv/prefix", json=body)).json()
        assert page == (await stack.client.post("/kv/prefix", json={"prompt": tokens})).json()
        assert page["tokens"] == len(tokens)
        assert text not in str(page)
    assert (await stack.chat(messages=messages)).status_code == 200
    page = (await stack.client.post("/kv/prefix", json={"messages": messages, "block_size": BLOCK})).json()
    assert page["members"]["p"][0] == page["blocks"] > 0


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "/kv/prefix", {}, "prompt"),
        ("POST", "/kv/prefix", {"prompt": [1, "a"]}, "prompt"),
        ("POST", "/kv/prefix", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("POST", "/kv/prefix", {"prompt": "a", "block_size": 0}, "block_size"),
        ("POST", "/kv/prefix", {"prompt": "a", "model": "other"}, "model"),
        ("GET", "/kv/hottest?limit=0", None, "limit"),
        ("GET", "/kv/hottest?limit=x", None, "limit"),
    ],
)
async def test_wrong_questions_are_refused(start, method, path, body, param):
    stack = await start("p d")
    response = await stack.client.request(method, path, json=body)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == param


async def test_the_block_size_is_asked_for_where_it_is_not_clear(start):
    stack = await start("", {"workers": ("127.0.0.1:1",)})
    response = await stack.client.post("/kv/prefix", json={"prompt": "a"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "block_size")
    page = (await stack.client.post("/kv/prefix", json={"prompt": [1, 2, 3], "block_size": 1})).json()
    assert (page["blocks"], page["members"]) == (3, {})


def test_slower_tiers_and_pools_have_their_price():
    keys = block_keys(list(range(60)), 2, root_key("m"))
    index = PrefixIndex(max_blocks=1000, clock=lambda: 0.0)
    for worker in ("w", "other"):
        index.join(worker)
    index.join("pool", pool_medium=HOST)
    index.join("free", pool_medium=DISK)
    index.store("w", HBM, keys[: 16 * 10], [0])
    index.expect("w", keys[: 16 * 12], 9.0)
    index.store("w", HOST, keys[: 16 * 15], [0])
    index.store("pool", HOST, keys[: 16 * 20], [0])
    index.store("free", DISK, keys[: 16 * 30], [0])
    own = {"host": LoadCost(0.0, 1.0), "disk": LoadCost(0.0, 5.0), "remote": LoadCost(0.0, 9.0)}
    outlook = Outlook(index.lookup(keys), 2, own, {"pool": LoadCost(3.0, 2.0), "free": LoadCost(0.5, 0.0)})
    assert outlook.of("w") == Forecast(24, 4, 36, 3 * 1.0 + 3.0 + 5 * 2.0 + 0.5)
    assert outlook.of("other") == Forecast(0, 0, 60, 3.0 + 20 * 2.0 + 0.5)


@pytest.mark.parametrize(
    ("cached", "prompt", "size", "usable"),
    [(98, 100, 7, 98), (98, 98, 7, 91), (0, 1, 16, 0), (64, 80, 16, 64), (80, 80, 16, 64), (5, 5, 0, 0)],
)
def test_an_engine_computes_at_least_the_last_token(cached, prompt, size, usable):
    assert reusable_tokens(cached, prompt, size) == usable
