"""Generation through the real HTTP and gRPC wires, against scripted workers."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from omni_common.errors import Internal, InvalidRequest, ResourceExhausted, Unavailable

MODEL = "tiny"


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def streamed_text(text: str) -> str:
    return "".join(c["delta"].get("content") or "" for e in events(text) for c in e["choices"])


def body(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Tell a story"}], "max_tokens": 24} | changes


async def answer(stack: Any, **changes: Any) -> str:
    response = await stack.chat(**changes)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("fleet", ["p d", "d", "b"])
@pytest.mark.parametrize("burst", [1, 3])
async def test_streaming_equals_whole(start, fleet, burst):
    stack = await start(fleet, burst=burst)
    whole = (await stack.chat()).json()
    streamed = await stack.chat(stream=True, stream_options={"include_usage": True})
    choice = whole["choices"][0]
    assert streamed_text(streamed.text) == choice["message"]["content"] != ""
    assert choice["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 24
    assert events(streamed.text)[-1]["usage"]["completion_tokens"] == 24
    await stack.until_settled()


async def test_prefill_apart_gives_the_text_of_one_worker(start):
    apart, alone = await start("p1 d1"), await start("d2")
    assert await answer(apart) == await answer(alone)
    submit = apart["d1"].submits[0]
    assert submit.num_output_tokens == 1
    assert submit.sampling.max_tokens == 23
    assert submit.kv_handle.lease_id == apart["p1"].prefills[0].request_id
    assert apart.metric("omni_proxy_first_tokens_total", source="prefill") == 1
    assert apart.metric("omni_proxy_decisions_total", reason="disaggregated", policy="least_uncached_tokens") == 1
    assert not apart["p1"].released


@pytest.mark.parametrize(
    ("changes", "source"),
    [
        pytest.param({"seed": 7, "temperature": 1.0}, "recompute_seeded", id="seed"),
        pytest.param({"presence_penalty": 0.5}, "recompute_penalised", id="presence"),
        pytest.param({"frequency_penalty": -0.5}, "recompute_penalised", id="frequency"),
        pytest.param({"seed": 7, "temperature": 0}, "prefill", id="greedy seed"),
    ],
)
async def test_decode_draws_the_first_token_where_it_must(start, changes, source):
    stack = await start("p d")
    plain = await answer(stack)
    assert await answer(stack, **changes) == plain
    submit = stack["d"].submits[-1]
    assert submit.num_output_tokens == (1 if source == "prefill" else 0)
    assert submit.HasField("kv_handle")
    assert stack.metric("omni_proxy_first_tokens_total", source=source) >= 1


async def test_a_prompt_of_whole_blocks_recomputes_the_first_token(start):
    stack = await start("p d", block_size=1)
    await answer(stack)
    assert stack["d"].submits[0].num_output_tokens == 0
    assert stack.metric("omni_proxy_first_tokens_total", source="recompute_full_block") == 1


async def test_a_sequence_that_ends_in_prefill_never_reaches_decode(start):
    stack = await start("p d", stops_at=0)
    reply = (await stack.chat()).json()
    assert reply["choices"][0] | {"message": {}} == {
        "index": 0, "message": {}, "logprobs": None, "finish_reason": "stop", "stop_reason": None,
    }  # fmt: skip
    assert reply["choices"][0]["message"]["content"] == ""
    assert reply["usage"]["completion_tokens"] == 1
    assert not stack["d"].submits


async def test_one_token_is_prefills_alone_and_its_lease_is_ended(start):
    stack = await start("p d")
    assert (await stack.chat(max_tokens=1)).json()["choices"][0]["finish_reason"] == "length"
    assert not stack["d"].submits
    await stack.until_settled()
    assert stack.metric("omni_proxy_kv_releases_total") == 1


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_cut_the_text_and_abort_decode(start, include, stream):
    stack = await start("p d")
    whole = await answer(stack, max_tokens=60)
    stop = whole[12:17]
    want = whole[: whole.index(stop) + (len(stop) if include else 0)]
    response = await stack.chat(max_tokens=60, stop=["zzz", stop], include_stop_str_in_output=include, stream=stream)
    if stream:
        assert streamed_text(response.text) == want
        assert events(response.text)[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        choice = response.json()["choices"][0]
        assert (choice["message"]["content"], choice["stop_reason"]) == (want, stop)
    async with asyncio.timeout(5):
        assert await stack["d"].aborted.get() == stack["d"].submits[-1].request_id
    await stack.until_settled()


async def test_a_stop_string_in_the_first_token_ends_the_lease(start):
    stack = await start("p d")
    first = (await answer(stack, max_tokens=60))[0]
    stack["d"].submits.clear()
    assert await answer(stack, stop=first) == ""
    assert not stack["d"].submits
    await stack.until_settled()
    assert stack.metric("omni_proxy_kv_releases_total") == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_aborts_decode(start, stream):
    stack = await start("p d", hold_after=5)
    request = asyncio.create_task(stack.chat(stream=stream))
    async with asyncio.timeout(5):
        await stack["d"].held.wait()
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        assert await stack["d"].aborted.get() == stack["d"].submits[0].request_id
    await stack.until_settled()


async def test_a_client_that_leaves_cancels_prefill(start):
    stack = await start("p d")
    stack["p"].prefill_gate = asyncio.Event()
    request = asyncio.create_task(stack.chat())
    async with asyncio.timeout(5):
        await stack["p"].prefill_started.wait()
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        assert await stack["p"].aborted.get() == stack["p"].prefills[0].request_id
        while not stack["p"].released:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert stack["p"].released == [stack["p"].prefills[0].request_id], "its answer might have been on its way"
    await stack.until_settled()


async def test_a_deadline_aborts_and_answers_504(start):
    stack = await start("d", {"request_timeout_s": 1.0}, hold_after=3)
    response = await stack.chat()
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline"
    async with asyncio.timeout(5):
        await stack["d"].aborted.get()
    streamed = await stack.chat(stream=True)
    assert '"error"' in streamed.text.split("\n\n")[-2]
    await stack.until_settled()


@pytest.mark.parametrize("error", [Unavailable("away"), Internal("broken"), ResourceExhausted("full")], ids=str)
async def test_a_failed_prefill_is_tried_elsewhere(start, error):
    stack = await start("p1 p2 d")
    plain = await answer(stack)
    for name in ("p1", "p2"):
        stack[name].prefills.clear()
    stack["p2"].prefill_error = error
    texts = [await answer(stack) for _ in range(4)]
    assert texts == [plain] * 4
    assert stack["p1"].prefills
    assert stack.metric("omni_proxy_retries_total", leg="prefill") == len(stack["p2"].prefills)


async def test_without_prefill_workers_decode_computes_the_prompt(start):
    stack = await start("p d")
    plain = await answer(stack)
    stack["p"].prefill_error = Unavailable("away")
    assert await answer(stack) == plain
    assert not stack["d"].submits[-1].HasField("kv_handle")
    assert stack["d"].submits[-1].num_output_tokens == 0


async def test_what_the_prefill_worker_refuses_is_the_clients_to_mend(start):
    stack = await start("p d")
    stack["p"].prefill_error = InvalidRequest("too long for the engine", field="prompt")
    response = await stack.chat()
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, "prompt", "invalid_argument")


async def test_a_rejected_submit_goes_to_another_decode_worker(start):
    stack = await start("p d1 d2")
    stack["d1"].reject = ("UNAVAILABLE", "draining", "")
    texts = {await answer(stack) for _ in range(3)}
    assert len(texts) == 1
    assert len(stack["d2"].submits) == 3
    assert stack["d2"].submits[0].HasField("kv_handle")


async def test_a_submit_that_everyone_rejects_keeps_its_reason(start):
    stack = await start("d", reject=("RESOURCE_EXHAUSTED", "full", ""))
    response = await stack.chat()
    assert (response.status_code, response.json()["error"]["message"]) == (429, "full")
    assert (int(response.headers["retry-after"]), response.headers["x-omni-dropped-reason"]) == (1, "rejected")
    assert stack.metric("omni_proxy_dropped_total", reason="rejected") == 1


async def test_blocks_that_everyone_rejects_are_freed(start):
    stack = await start("p d")
    stack["d"].reject = ("INVALID_ARGUMENT", "min_p cannot be used", "min_p")
    assert (await stack.chat()).status_code == 400
    await stack.until_settled()
    assert stack["d"].submits[0].HasField("kv_handle")
    assert stack.metric("omni_proxy_kv_releases_total") == 1


async def test_what_a_decode_worker_finds_wrong_is_the_callers_to_mend(start):
    stack = await start("d1 d2", reject=("INVALID_ARGUMENT", "min_p cannot be used", "min_p"))
    response = await stack.chat()
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_argument", "min_p")
    assert sum(len(worker.submits) for worker in stack.workers.values()) == 1, "another worker would say the same"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fleet", ["p d1 d2", "p d1"])
async def test_a_broken_session_is_resumed_without_a_gap(start, stream, fleet):
    stack = await start(fleet, hold_after=9)
    stack["d1"].resumed.set()
    plain = await answer(stack)
    for name, worker in stack.workers.items():
        worker.submits.clear()
        worker.resumed.clear()
        assert name
    request = asyncio.create_task(stack.chat(stream=stream))
    decodes = [w for n, w in stack.workers.items() if n[0] == "d"]
    async with asyncio.timeout(10):
        await asyncio.wait([asyncio.create_task(w.held.wait()) for w in decodes], return_when="FIRST_COMPLETED")
        (holder,) = [w for w in decodes if w.live]
        for worker in decodes:
            worker.resumed.set()
            worker.hold_after = None
        holder.live.clear()
        holder.breaks.set()
        response = await request
    text = streamed_text(response.text) if stream else response.json()["choices"][0]["message"]["content"]
    assert text == plain
    resumed = [s for w in decodes for s in w.submits][-1]
    assert resumed.num_output_tokens >= 9 - 4
    assert resumed.num_output_tokens + resumed.sampling.max_tokens == 24
    assert stack.metric("omni_proxy_resumes_total") == 1
    await stack.until_settled()


async def test_a_stream_that_cannot_resume_ends_in_an_error(start):
    stack = await start("d", {"resume_timeout_s": 0.0}, hold_after=4)
    request = asyncio.create_task(stack.chat(stream=True))
    async with asyncio.timeout(10):
        await stack["d"].held.wait()
        stack["d"].breaks.set()
        response = await request
    assert response.status_code == 200
    last = [part for part in response.text.split("\n\n") if part][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    await stack.until_settled()


async def test_no_worker_answers_503_with_retry_after(start):
    stack = await start("p")
    response = await stack.chat()
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    ready = await stack.client.get("/ready")
    assert (ready.status_code, ready.json()["ready"]) == (503, False)


async def test_more_than_the_bound_is_refused_with_429(start):
    stack = await start("d", {"max_inflight": 1}, hold_after=3)
    running = asyncio.create_task(stack.chat())
    async with asyncio.timeout(5):
        await stack["d"].held.wait()
    refused = await stack.chat()
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    stack["d"].resumed.set()
    assert (await running).status_code == 200


async def test_choices_share_a_prompt_and_differ_by_seed(start):
    stack = await start("p d")
    response = (await stack.chat(n=3, seed=5, temperature=1.0)).json()
    assert [c["index"] for c in response["choices"]] == [0, 1, 2]
    assert sorted(p.sampling.seed for p in stack["p"].prefills) == [5, 6, 7]
    assert len({p.request_id for p in stack["p"].prefills}) == 3
    assert response["usage"]["completion_tokens"] == 72
    assert response["usage"]["prompt_tokens"] == len(stack["p"].prefills[0].token_ids)
    await stack.until_settled()


async def test_batches_are_indexed_prompt_by_prompt(start):
    stack = await start("p d")
    asked = {"model": MODEL, "prompt": ["The fox", [40, 41, 42]], "n": 2, "max_tokens": 5, "echo": True}
    choices = (await stack.client.post("/v1/completions", json=asked)).json()["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2, 3]
    assert all(c["text"].startswith("The fox") for c in choices[:2])
    streamed = await stack.client.post("/v1/completions", json=asked | {"stream": True})
    texts = ["", "", "", ""]
    for event in events(streamed.text):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [c["text"] for c in choices]


async def test_openai_sdk_reads_the_answers(start):
    stack = await start("p d")
    async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none") as sdk:
        asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
        whole = await sdk.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
        text, rows = "", 0
        async for chunk in await sdk.chat.completions.create(**asked, stream=True, logprobs=True, top_logprobs=2):
            for choice in chunk.choices:
                text += choice.delta.content or ""
                rows += len(choice.logprobs.content or []) if choice.logprobs else 0
        assert text == whole.choices[0].message.content
        assert rows == len(whole.choices[0].logprobs.content) == 8
        assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
        plain = await sdk.completions.create(model=MODEL, prompt="hi", max_tokens=4, logprobs=1)
        assert len(plain.choices[0].logprobs.tokens) == 4
        assert [m.id async for m in sdk.models.list()] == [MODEL]
        with pytest.raises(openai.NotFoundError) as missing:
            await sdk.chat.completions.create(**asked | {"model": "other"})
        assert missing.value.code == "model_not_found"


async def test_the_trace_spans_the_legs_and_carries_no_text(start):
    stack = await start("p d")
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"traceparent": parent, "x-request-id": "my-id"}
    response = await stack.client.post("/v1/chat/completions", json=body(), headers=headers)
    assert response.headers["x-request-id"] == "my-id"
    await stack.until_settled()
    spans = {span.name: span for span in stack.spans.get_finished_spans()}
    root, prefill, decode = spans["proxy.request"], spans["proxy.prefill"], spans["proxy.decode"]
    assert f"{root.context.trace_id:032x}" == parent.split("-")[1]
    assert prefill.parent.span_id == decode.parent.span_id == root.context.span_id
    assert stack["p"].metadata[0]["traceparent"].split("-")[2] == f"{prefill.context.span_id:016x}"
    assert stack["d"].submits[0].traceparent.split("-")[2] == f"{decode.context.span_id:016x}"
    facts = root.attributes
    assert (facts["omni.prefill_worker_id"], facts["omni.decode_worker_id"]) == ("p", "d")
    assert (facts["omni.output_tokens"], facts["omni.first_token_source"]) == (24, "prefill")
    assert "story" not in str([s.attributes for s in spans.values()])


async def test_tools_are_rendered_and_calls_are_parsed(start):
    stack = await start("d")
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    plain, with_tools = await stack.chat(), await stack.chat(tools=[tool])
    assert with_tools.json()["usage"]["prompt_tokens"] > plain.json()["usage"]["prompt_tokens"]

    said = 'Wait. <tool_call>{"name": "look", "arguments": {"at": 1}}</tool_call>'
    worker = stack["d"]
    worker.script = (await stack.client.post("/tokenize", json={"prompt": said})).json()["tokens"]
    worker.offset, worker.stops_at = 0, len(worker.script)
    whole = (await stack.chat(tools=[tool], max_tokens=100)).json()["choices"][0]
    assert (whole["finish_reason"], whole["message"]["content"]) == ("tool_calls", "Wait. ")
    assert whole["message"]["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at": 1}'}
    streamed = await stack.chat(tools=[tool], max_tokens=100, stream=True)
    deltas = [c["delta"] for e in events(streamed.text) for c in e["choices"]]
    (call,) = [c for d in deltas for c in d.get("tool_calls", [])]
    assert (call["index"], call["function"]["name"]) == (0, "look")
    assert streamed_text(streamed.text) == "Wait. "
    untouched = (await stack.chat(tools=[tool], max_tokens=100, tool_choice="none")).json()["choices"][0]
    assert (untouched["message"]["content"], untouched["finish_reason"]) == (said, "stop")


async def test_reasoning_is_told_apart_from_content(start):
    stack = await start("d", settings={"output_format": "qwen3"})
    said = "<think>Hm, a story.</think>The fox jumps."
    worker = stack["d"]
    worker.script = (await stack.client.post("/tokenize", json={"prompt": said})).json()["tokens"]
    worker.offset, worker.stops_at = 0, len(worker.script)
    whole = (await stack.chat(max_tokens=100)).json()["choices"][0]["message"]
    assert (whole["reasoning"], whole["content"]) == ("Hm, a story.", "The fox jumps.")
    streamed = await stack.chat(max_tokens=100, stream=True)
    deltas = [c["delta"] for e in events(streamed.text) for c in e["choices"]]
    assert "".join(d.get("reasoning", "") for d in deltas) == "Hm, a story."
    assert streamed_text(streamed.text) == "The fox jumps."
    silent = (await stack.chat(max_tokens=100, include_reasoning=False)).json()["choices"][0]["message"]
    assert (silent.get("reasoning"), silent["content"]) == (None, "The fox jumps.")


async def test_status_pages(start):
    stack = await start("p d")
    get = stack.client.get
    assert (await get("/health")).status_code == 200
    assert (await get("/ready")).json()["parts"]["workers"] == {"p": "ok", "d": "ok"}
    assert {w["id"] for w in (await get("/workers")).json()["workers"]} == {"p", "d"}
    await stack.chat()
    page = (await get("/metrics")).text
    assert 'omni_proxy_requests_total{code="200"} 1.0' in page
    assert (await get(f"/v1/models/{MODEL}")).json()["max_model_len"] == 256
    assert (await get("/nowhere")).json()["error"]["type"] == "not_found"


async def test_no_page_needs_another_network(start):
    stack = await start("d")
    for path in ("/docs", "/redoc"):
        assert (await stack.client.get(path)).status_code == 404
    assert {"/v1/chat/completions", "/v1/models", "/ready"} <= set(
        (await stack.client.get("/openapi.json")).json()["paths"]
    )


async def test_tokenize_and_detokenize(start):
    stack = await start("d")
    tokens = (await stack.client.post("/tokenize", json={"prompt": "The fox 🙂"})).json()
    assert tokens["count"] == len(tokens["tokens"])
    back = await stack.client.post("/detokenize", json={"tokens": tokens["tokens"]})
    assert back.json() == {"prompt": "The fox 🙂"}
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert (await stack.client.post("/tokenize", json={"messages": messages})).json()["count"] > 2


async def test_a_worker_that_returns_is_used_again(start):
    stack = await start("d", {"resume_timeout_s": 5.0})
    plain = await answer(stack)
    stack["d"].breaks.set()
    async with asyncio.timeout(5):
        while stack.proxy.fleet.can_decode:
            await stack.proxy.fleet.changed()
        while not stack.proxy.fleet.can_decode:
            await stack.proxy.fleet.changed()
    assert await answer(stack) == plain


async def test_two_requests_share_a_session(start):
    stack = await start("p d")
    replies: list[httpx.Response] = await asyncio.gather(*(stack.chat() for _ in range(8)))
    assert len({r.json()["choices"][0]["message"]["content"] for r in replies}) == 1
    assert {s.stream_id for s in stack["d"].submits} == set(range(1, 9))
