"""Keys, rates, the queue and a change of the configuration, over HTTP."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

ONE_AT_A_TIME = {"lookahead_ms": 0.01, "max_hold_ms": 60_000}
"""So that a prompt in flight, however short, leaves no room for the next."""


@pytest.fixture
def begin(start: Any, tmp_path: Path) -> Callable[..., Awaitable[Any]]:
    """A stack under a configuration; `stack.configure` writes another one and waits until it is in force."""
    path = tmp_path / "scheduler.yaml"

    async def make(config: dict[str, Any], fleet: str = "p d", **worker: Any) -> Any:
        path.write_text(yaml.safe_dump(config))
        stack = await start(fleet, {"scheduler_config": path}, **worker)

        async def configure(new: dict[str, Any], headers: dict[str, str] | None = None) -> None:
            before = (await stack.client.get("/config", headers=headers)).json()["digest"]
            path.write_text(yaml.safe_dump(new))
            async with asyncio.timeout(10):
                while (await stack.client.get("/config", headers=headers)).json()["digest"] == before:
                    pass

        stack.configure = configure
        return stack

    return make


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "Tell a story"}], "max_tokens": 4} | fields


def ask(stack: Any, name: str, **headers: str) -> asyncio.Task[httpx.Response]:
    given = {"x-request-id": name} | {key.replace("_", "-"): value for key, value in headers.items()}
    return asyncio.create_task(stack.client.post("/v1/chat/completions", json=body(), headers=given))


async def waiting(stack: Any, count: int, band: str = "default") -> None:
    """Until so many are held back."""
    async with asyncio.timeout(10):
        while stack.metric("omni_proxy_flow_waiting", band=band) != count:  # noqa: ASYNC110
            await asyncio.sleep(0)


def order_of(stack: Any) -> list[str]:
    """Request ids as they came to the prefill worker."""
    return [request.request_id.rsplit("-", 2)[0] for request in stack["p"].prefills]


async def test_a_flood_of_one_tenant_does_not_keep_the_others_waiting(begin):
    stack = await begin({"flow": ONE_AT_A_TIME})
    stack["p"].prefill_gate = asyncio.Event()
    flood = [ask(stack, f"flood.{n}", x_omni_tenant="flood") for n in range(30)]
    await waiting(stack, 29)
    quiet = [ask(stack, f"quiet.{n}", x_omni_tenant=f"quiet{n % 2}") for n in range(4)]
    await waiting(stack, 33)
    urgent = ask(stack, "urgent", x_omni_tenant="flood", x_omni_priority="10")
    await waiting(stack, 1, band="high")
    stack["p"].prefill_gate.set()
    answers = await asyncio.gather(*flood, *quiet, urgent)
    assert {answer.status_code for answer in answers} == {200}
    order = order_of(stack)
    assert order[1] == "urgent"
    assert max(order.index(f"quiet.{n}") for n in range(4)) <= 7
    assert [name for name in order if name.startswith("flood")] == [f"flood.{n}" for n in range(30)]
    await stack.until_settled()


async def test_who_goes_away_while_held_gives_up_the_place(begin):
    stack = await begin({"flow": ONE_AT_A_TIME | {"max_requests": 1}})
    stack["p"].prefill_gate = asyncio.Event()
    running = ask(stack, "running")
    await stack["p"].prefill_started.wait()
    held = ask(stack, "held")
    await waiting(stack, 1)
    refused = await ask(stack, "refused")
    assert refused.status_code == 429 and refused.headers["x-omni-dropped-reason"] == "queue_full"
    assert int(refused.headers["retry-after"]) >= 1
    held.cancel()
    await waiting(stack, 0)
    last = ask(stack, "last")
    await waiting(stack, 1)
    stack["p"].prefill_gate.set()
    assert (await running).status_code == (await last).status_code == 200
    assert order_of(stack) == ["running", "last"]
    assert stack.metric("omni_proxy_dropped_total", reason="queue_full") == 1
    await stack.until_settled()


async def test_who_is_left_no_worker_by_a_filter_counts_as_dropped(begin):
    nobody = {"name": "selector", "required": True, "parameters": {"match_labels": {"omni.zone": "nowhere"}}}
    stack = await begin({"filters": [nobody]})
    refused = await ask(stack, "refused")
    assert refused.status_code == 503 and refused.headers["x-omni-dropped-reason"] == "filtered_out"
    assert refused.headers["retry-after"] == "1"
    assert stack.metric("omni_proxy_dropped_total", reason="filtered_out") == 1
    await stack.until_settled()


async def test_every_guarded_page_asks_for_a_key(begin):
    stack = await begin({"tenants": [{"name": "a", "keys": [{"key": "sk-a"}]}]})
    for path in (
        "/v1/models",
        "/v1/models/tiny",
        "/workers",
        "/decisions",
        "/decisions/x",
        "/config",
        "/kv",
        "/kv/hottest",
    ):
        refused = await stack.client.get(path)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer", path
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/kv/prefix"):
        refused = await stack.client.post(path, content=b"not read", headers={"authorization": "Bearer sk-b"})
        assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key", path
        assert refused.json()["error"]["type"] == "authentication_error"
    for path in ("/health", "/ready", "/metrics"):
        assert (await stack.client.get(path)).status_code == 200
    answer = await ask(stack, "r", authorization="Bearer sk-a")
    assert answer.status_code == 200
    page = (await stack.client.get("/config", headers={"x-api-key": "sk-a"})).text
    assert "sk-a" not in page and "tenants" in page
    spans = [str(span.attributes) for span in stack.spans.get_finished_spans()]
    assert spans and not any("sk-a" in attributes for attributes in spans)


async def test_rates_are_told_and_refused_with_a_time_to_retry(begin):
    stack = await begin({"tenants": [{"name": "a", "requests_per_minute": 2, "tokens_per_minute": 5000}]})
    first = await ask(stack, "one", x_omni_tenant="a")
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    await stack.until_settled()
    used = first.json()["usage"]["total_tokens"]
    second = await ask(stack, "two", x_omni_tenant="a")
    assert int(second.headers["x-ratelimit-remaining-tokens"]) >= 5000 - 2 * used - 200
    refused = await ask(stack, "three", x_omni_tenant="a")
    assert refused.status_code == 429 and refused.headers["x-omni-dropped-reason"] == "requests_per_minute"
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert (await ask(stack, "other", x_omni_tenant="b")).status_code == 200
    assert stack.metric("omni_proxy_tenant_refusals_total", tenant="a", reason="requests_per_minute") == 1


async def test_tokens_of_a_refused_request_are_not_used(begin):
    stack = await begin({"tenants": [{"name": "a", "tokens_per_minute": 100}]})
    huge = await stack.client.post(
        "/v1/completions", json={"model": "tiny", "prompt": [5] * 99, "max_tokens": 50}, headers={"x-omni-tenant": "a"}
    )
    assert huge.status_code == 429 and "retry-after" not in huge.headers
    assert huge.headers["x-ratelimit-remaining-tokens"] == "100"
    wrong = await stack.client.post(
        "/v1/completions", json={"model": "tiny", "prompt": [], "max_tokens": 5}, headers={"x-omni-tenant": "a"}
    )
    assert wrong.status_code == 400
    await stack.until_settled()


async def test_what_the_queue_refuses_uses_no_tokens_and_is_explained(begin):
    flow = ONE_AT_A_TIME | {"ttl_s": 0.05}
    stack = await begin({"flow": flow, "tenants": [{"name": "a", "tokens_per_day": 1e6}]})
    stack["p"].prefill_gate = asyncio.Event()
    first = ask(stack, "first", x_omni_tenant="a")
    await stack["p"].prefill_started.wait()
    refused = await ask(stack, "refused", x_omni_tenant="a")
    assert (refused.status_code, refused.headers["x-omni-dropped-reason"]) == (429, "queue_ttl")
    explained = (await stack.client.get("/decisions/refused")).json()
    assert (explained["error"], explained["reason"]) == ("RESOURCE_EXHAUSTED", "queue_ttl")
    assert explained["seen"]["e2e_ms"] >= 50
    stack["p"].prefill_gate.set()
    usage = (await first).json()["usage"]
    await stack.until_settled()
    for whose in ("omni_proxy_prompt_tokens_total", "omni_proxy_tenant_prompt_tokens_total"):
        labels = {"tenant": "a"} if "tenant" in whose else {}
        assert stack.metric(whose, **labels) == usage["prompt_tokens"]
    await stack.configure({"flow": flow, "tenants": [{"name": "a", "tokens_per_day": 2 * usage["total_tokens"]}]})
    last = await ask(stack, "last", x_omni_tenant="a")
    over = await ask(stack, "over", x_omni_tenant="a")
    assert (last.status_code, over.headers["x-omni-dropped-reason"]) == (200, "tokens_per_day")
    await stack.until_settled()


@pytest.mark.parametrize(
    ("header", "value"), [("x-omni-priority", "big"), ("x-omni-ttft-slo-ms", "0"), ("x-omni-session", "a b")]
)
async def test_a_wrong_header_is_400_and_named(begin, header, value):
    stack = await begin({})
    refused = await ask(stack, "r", **{header: value})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == header


async def test_the_caller_reaches_the_decision(begin):
    stack = await begin({})
    await ask(stack, "mine", x_omni_tenant="t", x_omni_priority="3")
    page = (await stack.client.get("/decisions/mine")).json()
    assert (page["tenant"], page["priority"]) == ("t", 3)


async def test_a_change_of_the_configuration_loses_none_of_fifty_streams(begin):
    """Half of them are streaming and half held back when bands, order, fairness, policy and keys change."""
    stack = await begin({"flow": ONE_AT_A_TIME}, hold_after=2)
    streaming = [asyncio.create_task(stream(stack, f"s.{n}", str(n % 3))) for n in range(25)]
    async with asyncio.timeout(10):
        while len(stack["d"].submits) < 25:  # noqa: ASYNC110
            await asyncio.sleep(0)
    stack["p"].prefill_gate = asyncio.Event()
    held = [asyncio.create_task(stream(stack, f"h.{n}", str(n % 3), priority=str(n % 2))) for n in range(25)]
    await waiting(stack, 24)
    bands = [{"priority": 1, "name": "odd"}, {"priority": 0, "name": "even", "order": "fcfs"}]
    await stack.configure(
        {
            "policy": {"name": "round_robin"},
            "flow": ONE_AT_A_TIME | {"bands": bands, "order": "lpt", "fairness": "round_robin", "max_requests": 3},
            "tenants": [{"name": "new", "keys": [{"key": "sk-new"}]}],
        },
        headers={"x-api-key": "sk-new"},
    )
    assert (
        stack.metric("omni_proxy_flow_waiting", band="odd") + stack.metric("omni_proxy_flow_waiting", band="even") == 24
    )
    assert (await ask(stack, "stranger")).status_code == 401
    stack["p"].prefill_gate.set()
    stack["d"].resumed.set()
    texts = await asyncio.gather(*streaming, *held)
    assert len(texts) == 50 and all(text.endswith("data: [DONE]\n\n") and '"error"' not in text for text in texts)
    odd, even = (
        [n for n in order_of(stack)[26:] if int(n[2:]) % 2],
        [n for n in order_of(stack)[26:] if not int(n[2:]) % 2],
    )
    assert order_of(stack)[26:] == odd + even
    assert stack.metric("omni_proxy_config_reloads_total", result="applied") == 1
    await stack.until_settled()


async def stream(stack: Any, name: str, tenant: str, priority: str = "0") -> str:
    headers = {"x-request-id": name, "x-omni-tenant": tenant, "x-omni-priority": priority}
    parts: list[str] = []
    async with stack.client.stream("POST", "/v1/chat/completions", json=body(stream=True), headers=headers) as answer:
        assert answer.status_code == 200
        async for part in answer.aiter_text():
            parts.append(part)
    return "".join(parts)


async def test_a_file_that_breaks_changes_nothing(begin, tmp_path):
    stack = await begin({"slo": {"ttft_ms": 100}})
    (tmp_path / "scheduler.yaml").write_text("slo: {ttft_ms: never}")
    async with asyncio.timeout(10):
        while not stack.metric("omni_proxy_config_reloads_total", result="invalid"):
            await stack.client.get("/health")
    assert (await stack.client.get("/config")).json()["effective"]["slo"]["ttft_ms"] == 100
