"""Malformed requests: status, named field, and no worker touched."""

import asyncio
import gzip
import json
import shutil
import threading
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from omni_proxy import bodies
from omni_proxy.text import ModelText

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
PLAIN = {"model": "tiny", "prompt": "hi", "max_tokens": 4}

CHAT_CASES: list[tuple[dict[str, Any], int, str | None]] = [
    ({"model": None}, 400, "model"),
    ({"model": 3}, 400, "model"),
    ({"model": "other"}, 404, "model"),
    ({"messages": None}, 400, "messages"),
    ({"messages": []}, 400, "messages"),
    ({"messages": "hi"}, 400, "messages"),
    ({"messages": ["hi"]}, 400, "messages[0]"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, 400, "messages[0].role"),
    ({"messages": [{"content": "hi"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
        400,
        "messages[0].content[1].type",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages[0].content[0].text"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}]},
        400,
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"messages": [{"role": "assistant", "content": None}]}, 400, "messages[0].content"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": 1.5}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"),
    ({"max_completion_tokens": 0}, 400, "max_completion_tokens"),
    ({"temperature": -0.1}, 400, "temperature"),
    ({"temperature": 2.1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_p": 1.1}, 400, "top_p"),
    ({"top_k": -2}, 400, "top_k"),
    ({"min_p": 1.5}, 400, "min_p"),
    ({"presence_penalty": 2.5}, 400, "presence_penalty"),
    ({"frequency_penalty": -2.5}, 400, "frequency_penalty"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty"),
    ({"seed": 2**63}, 400, "seed"),
    ({"seed": "x"}, 400, "seed"),
    ({"stop": ""}, 400, "stop"),
    ({"stop": ["a", ""]}, 400, "stop"),
    ({"stop": ["a"] * 17}, 400, "stop"),
    ({"stop": 3}, 400, "stop"),
    ({"stop_token_ids": ["a"]}, 400, "stop_token_ids"),
    ({"stop_token_ids": [100_000]}, 400, "stop_token_ids"),
    ({"min_tokens": 5}, 400, "min_tokens"),
    ({"min_tokens": 2**40, "max_tokens": None}, 400, "min_tokens"),
    ({"logit_bias": {"a": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias.5"),
    ({"logit_bias": {"100000": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, 400, "logit_bias"),
    ({"logit_bias": [1]}, 400, "logit_bias"),
    ({"logprobs": 3}, 400, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"n": 0}, 400, "n"),
    ({"n": 17}, 400, "n"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format.type"),
    ({"structured_outputs": {"regex": "a"}}, 400, "structured_outputs"),
    ({"stream": "yes"}, 400, "stream"),
    ({"functions": [{"name": "f"}]}, 400, "functions"),
    ({"function_call": "auto"}, 400, "function_call"),
    ({"modalities": ["text", "audio"]}, 400, "modalities"),
    ({"audio": {"voice": "a"}}, 400, "audio"),
    ({"parallel_tool_calls": "no"}, 400, "parallel_tool_calls"),
    ({"cache_salt": ""}, 400, "cache_salt"),
    ({"cache_salt": 7}, 400, "cache_salt"),
    ({"cache_salt": "x" * 257}, 400, "cache_salt"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, 400, "stream_options.include_usage"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"tools": [{"type": "function"}]}, 400, "tools[0].function.name"),
    ({"tools": {}}, 400, "tools"),
    ({"bad_words": ["a"]}, 400, "bad_words"),
    ({"allowed_token_ids": [5]}, 400, "allowed_token_ids"),
    ({"truncate_prompt_tokens": 5}, 400, "truncate_prompt_tokens"),
    ({"return_token_ids": True}, 400, "return_token_ids"),
    ({"prompt_logprobs": 0}, 400, "prompt_logprobs"),
    ({"priority": 1}, 400, "priority"),
    ({"chat_template": "{{ messages }}"}, 400, "chat_template"),
    ({"echo": True}, 400, "echo"),
    ({"reasoning_effort": 1}, 400, "reasoning_effort"),
    ({"user": 4}, 400, "user"),
    ({"ignore_eos": 1}, 400, "ignore_eos"),
    ({"chat_template_kwargs": "x"}, 400, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs"),
    ({"continue_final_message": True, "add_generation_prompt": True}, 400, "continue_final_message"),
    ({"messages": [{"role": "user", "content": "long " * 400}]}, 400, "messages"),
]
PLAIN_CASES: list[tuple[dict[str, Any], int, str | None]] = [
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": {"a": 1}}, 400, "prompt"),
    ({"prompt": [1, "a"]}, 400, "prompt"),
    ({"prompt": [1, -1]}, 400, "prompt"),
    ({"prompt": [100_000]}, 400, "prompt"),
    ({"prompt": ["a", 3]}, 400, "prompt[1]"),
    ({"prompt": [[1], [1.5]]}, 400, "prompt[1]"),
    ({"prompt": ["a"] * 20, "n": 16}, 400, "n"),
    ({"prompt": [5] * 300}, 400, "prompt"),
    ({"suffix": "x"}, 400, "suffix"),
    ({"prompt_embeds": "AAAA"}, 400, "prompt_embeds"),
    ({"best_of": 2}, 400, "best_of"),
    ({"logprobs": 21}, 400, "logprobs"),
    ({"logprobs": True}, 400, "logprobs"),
    ({"echo": True, "logprobs": 1}, 400, "echo"),
]
RAW_CASES = [
    (b"{", 400, "invalid_json"),
    (b"", 400, "invalid_json"),
    (b"[1]", 400, "invalid_json"),
    (b'{"model": "\xff"}', 400, "invalid_json"),
    (b'{"model": NaN}', 400, "invalid_json"),
    (b"[" * 100_000, 400, "invalid_json"),
    (b" " * 300_000, 413, "body_too_large"),
]


@pytest.fixture
async def stack(start):
    return await start("p d", {"max_body_bytes": 200_000})


async def check(stack: Any, path: str, cases: list[tuple[dict[str, Any], int, str | None]], base: Any) -> None:
    for change, status, param in cases:
        response = await stack.client.post(path, json=base | change)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (status, param), (change, response.text)
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] and error["code"]
    assert not any(worker.touched for worker in stack.workers.values())
    await stack.until_settled()


async def test_chat_requests(stack):
    await check(stack, "/v1/chat/completions", CHAT_CASES, CHAT)


async def test_completion_requests(stack):
    await check(stack, "/v1/completions", PLAIN_CASES, PLAIN)


async def test_bodies(stack):
    for body, status, code in RAW_CASES:
        response = await stack.client.post("/v1/chat/completions", content=body)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code), body[:20]
        assert response.json()["error"]["type"] == "invalid_request_error"


async def test_a_fault_of_ours_has_an_error_object_too(stack, monkeypatch):
    def fails(*_):
        raise KeyError("words of the prompt")

    monkeypatch.setattr("omni_proxy.bodies.parse_json", fails)
    response = await stack.client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine"})
    assert (response.status_code, response.headers["x-request-id"]) == (500, "mine")
    assert response.json()["error"]["code"] == "unexpected"
    assert "words" not in response.text
    assert stack.metric("omni_proxy_requests_total", code="500") == 1


async def test_a_body_without_length_is_bounded_while_it_is_read(stack):
    async def endless():
        for _ in range(100):
            yield b" " * 10_000

    response = await stack.client.post("/v1/chat/completions", content=endless())
    assert response.status_code == 413


async def test_long_conversations_are_taken_apart_and_rendered_beside_the_streams(stack, monkeypatch):
    threads = []

    def noting(of, name):
        really = getattr(of, name)

        def noted(*args, **kwargs):
            threads.append((name, threading.current_thread() is threading.main_thread()))
            return really(*args, **kwargs)

        monkeypatch.setattr(of, name, noted)

    noting(bodies, "parse_json")
    noting(ModelText, "render")
    long = [{"role": "user", "content": "hi" * 10}] * 2000
    assert (await stack.client.post("/tokenize", json={"messages": CHAT["messages"]})).status_code == 200
    answer = await stack.client.post("/tokenize", json={"messages": long})
    assert answer.json()["count"] > len(long)
    short, aside = [("parse_json", True), ("render", True)], [("parse_json", False), ("render", False)]
    assert threads == short + aside


async def test_a_packed_body_is_refused_as_such(stack):
    packed = gzip.compress(json.dumps(CHAT).encode())
    headers = {"content-encoding": "gzip"}
    response = await stack.client.post("/v1/chat/completions", content=packed, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_encoding")


async def test_a_client_that_leaves_within_its_body_is_no_fault_of_ours(stack, caplog):
    _, writer = await asyncio.open_connection(*stack.url.removeprefix("http://").split(":"))
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n{")
    await writer.drain()
    writer.close()
    async with asyncio.timeout(5):
        while not stack.metric("omni_proxy_requests_total", code="499"):
            await stack.client.get("/health")
    assert not stack.metric("omni_proxy_requests_total", code="500")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_too_long_prompts_have_their_code(stack):
    response = await stack.client.post("/v1/completions", json=PLAIN | {"prompt": [5] * 256})
    assert response.json()["error"]["code"] == "context_length_exceeded"


async def test_wrong_methods_and_paths(stack):
    wrong = await stack.client.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert (await stack.client.post("/v2/completions", json={})).status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"model": "other", "prompt": "a"}, "model"),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}, "return_token_strs"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "chat_template": "a"}, "chat_template"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ],
)
async def test_tokenizer_requests(stack, path, body, param):
    assert (await stack.client.post(path, json=body)).json()["error"]["param"] == param


async def test_accepted_requests_reach_the_engine_as_asked(start):
    stack = await start("d")
    asked = CHAT | {
        "top_k": -1, "top_p": 0.9, "min_p": 0.1, "stop_token_ids": [9], "ignore_eos": True, "min_tokens": 2,
        "logit_bias": {"5": -100}, "unknown_field": {"a": 1}, "temperature": 0, "repetition_penalty": 1.1,
        "bad_words": [], "priority": 0, "echo": False, "use_beam_search": False,
    }  # fmt: skip
    response = await stack.client.post("/v1/chat/completions", content=json.dumps(asked))
    assert response.status_code == 200
    sampling = stack["d"].submits[0].sampling
    assert (sampling.top_k, sampling.top_p, sampling.temperature, sampling.min_tokens) == (0, 0.9, 0.0, 2)
    assert (list(sampling.stop_token_ids), dict(sampling.logit_bias), sampling.ignore_eos) == ([9], {5: -100.0}, True)


async def test_a_chat_is_tokenized_as_the_tokenize_page_says(start, model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / model_dir.name)
    template = "{{ messages[0].content }} {{ reasoning_effort }} {{ enable_thinking }} {{ documents }}"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    stack = await start("d", {"model_dir": folder})
    prompts = []
    for extra in (
        {},
        {"add_special_tokens": True},
        {"reasoning_effort": "none"},
        {"reasoning_effort": "low"},
        {"documents": [{"text": "a"}]},
        {"chat_template_kwargs": {"self": 1, "reasoning_effort": "odd"}},
    ):
        tokens = (await stack.client.post("/tokenize", json={"messages": CHAT["messages"]} | extra)).json()["tokens"]
        assert (await stack.client.post("/v1/chat/completions", json=CHAT | extra)).status_code == 200, extra
        assert list(stack["d"].submits[-1].token_ids) == tokens, extra
        prompts.append(tokenizer.decode(tokens, skip_special_tokens=False))
    assert prompts == [
        "hi   ", "<|endoftext|>hi   ", "hi none False ", "hi low True ", "hi   [{'text': 'a'}]", "hi odd  ",
    ]  # fmt: skip


async def test_a_salt_reaches_both_legs_and_the_keys(start):
    stack = await start("p d")
    for salt in ({}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"cache_salt": "a"}):
        answer = await stack.client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 4} | salt)
        assert answer.status_code == 200
    legs = stack["p"].prefills
    assert [leg.cache_salt for leg in legs] == ["", "a", "b", "a"]
    assert [submit.cache_salt for submit in stack["d"].submits] == ["", "a", "b", "a"]
    none, a, b, again = (leg.block_keys for leg in legs)
    assert a == again
    assert len({none, a, b}) == 3
    known = [leg.uncached_tokens for leg in legs]
    assert known[:3] == [known[0]] * 3, "nobody's blocks are promised to another salt"
    assert known[3] < known[0]
    pages = [
        await stack.client.post("/kv/prefix", json={"messages": CHAT["messages"]} | s)
        for s in ({}, {"cache_salt": "c"})
    ]
    assert [max(sum(reached) for reached in page.json()["members"].values()) > 0 for page in pages] == [True, False]


@pytest.mark.parametrize(("source", "expected"), [("model", (0.7, 20)), ("none", (1.0, 0))])
async def test_sampling_defaults(start, source, expected):
    stack = await start("d", {"generation_defaults": source})
    await stack.client.post("/v1/chat/completions", json=CHAT)
    sampling = stack["d"].submits[0].sampling
    assert (sampling.temperature, sampling.top_k) == expected
