"""What an answer says beside its text: where tokens lie in it, and what ended it."""

import json
from typing import Any

import pytest

from omni_proxy.openai_logprobs import CompletionRows
from omni_proxy.ports import LogprobRow
from omni_proxy.text import ModelText

ASKED = {"model": "tiny", "prompt": "hi", "max_tokens": 60, "logprobs": 1}


def chunks(answer: Any) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    return [choice for line in lines for choice in json.loads(line)["choices"]]


@pytest.mark.parametrize("burst", [1, 2, 5])
async def test_offsets_are_places_in_the_text_however_it_arrives(start, burst):
    stack = await start("p d", burst=burst)
    whole = (await stack.client.post("/v1/completions", json=ASKED)).json()["choices"][0]
    rows, text = whole["logprobs"], whole["text"]
    assert "🙂" in text
    plain = [(at, token) for at, token in zip(rows["text_offset"], rows["tokens"], strict=True) if token.isascii()]
    assert [text[at : at + len(token)] for at, token in plain] == [token for _, token in plain]
    for stop in (None, "dogs"):
        streamed = await stack.client.post("/v1/completions", json=ASKED | {"stream": True, "stop": stop})
        offsets = [at for c in chunks(streamed) if c["logprobs"] for at in c["logprobs"]["text_offset"]]
        assert offsets == rows["text_offset"][: len(offsets)]
        assert stop or len(offsets) == 60


async def test_a_part_of_a_character_keeps_its_own_probability(model_dir):
    text = ModelText(model_dir)
    parts = [i for i in range(text.vocab_size) if text.token_text(i)[0] == "\N{REPLACEMENT CHARACTER}"][:3]
    rows = CompletionRows(text.token_text, text.detokenizer(skip_special_tokens=True))
    found = rows([LogprobRow([parts[0], *parts], [-0.5, -0.5, -1.0, -2.0])])
    assert found["top_logprobs"] == [{"\N{REPLACEMENT CHARACTER}": -0.5}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("position", [0, 5])
async def test_a_stop_token_is_named_as_what_ended_the_answer(start, stream, position):
    stack = await start("p d", stops_at=position)
    for ids, reason in (([0, 7], 0), ([7], None)):
        answer = await stack.client.post(
            "/v1/completions", json=ASKED | {"stop_token_ids": ids, "logprobs": None, "stream": stream}
        )
        last = chunks(answer)[-1] if stream else answer.json()["choices"][0]
        assert (last["finish_reason"], last["stop_reason"]) == ("stop", reason)


async def test_a_prompt_to_repeat_is_made_text_once(start, monkeypatch):
    stack, made = await start("p d"), list[list[int]]()
    prompts, decode = [[40, 41], [42]], ModelText.decode
    texts = [(await stack.client.post("/detokenize", json={"tokens": p})).json()["prompt"] for p in prompts]
    monkeypatch.setattr(ModelText, "decode", lambda text, ids: made.append(ids) or decode(text, ids))
    asked = ASKED | {"logprobs": None, "echo": True, "n": 3, "prompt": prompts}
    choices = (await stack.client.post("/v1/completions", json=asked)).json()["choices"]
    assert made == prompts
    assert [c["text"].startswith(texts[i // 3]) for i, c in enumerate(choices)] == [True] * 6
