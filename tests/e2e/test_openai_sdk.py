"""The stack as a client of the OpenAI SDK sees it, on real engines."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from live import LiveStack

pytestmark = [pytest.mark.engine, pytest.mark.stack, pytest.mark.timeout(600)]

QUESTIONS = ["What is 7 plus 5?", "What colour is the sky?", "Tell me a short story about a cat.", "Who are you?"]


def ask(sdk: openai.OpenAI, model: str, question: str, **options: object) -> openai.types.chat.ChatCompletion:
    messages = [{"role": "user", "content": question}]
    return sdk.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=160, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("question", QUESTIONS)
def test_chat_streamed_equals_unstreamed(stack: LiveStack, sdk: openai.OpenAI, question: str) -> None:
    whole = ask(sdk, stack.model, question)
    chunks = list(ask(sdk, stack.model, question, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert text.strip()
    assert chunks[-1].usage.model_dump(exclude={"prompt_tokens_details"}) == whole.usage.model_dump(
        exclude={"prompt_tokens_details"}
    )
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert reasons == [whole.choices[0].finish_reason] == ["stop"]


def test_completion_streamed_equals_unstreamed(stack: LiveStack, sdk: openai.OpenAI) -> None:
    options = {"model": stack.model, "prompt": "Once upon a time", "max_tokens": 60, "temperature": 0}
    whole = sdk.completions.create(**options)  # type: ignore[call-overload]
    streamed = "".join(c.choices[0].text for c in sdk.completions.create(stream=True, **options))  # type: ignore[call-overload]
    assert streamed == whole.choices[0].text
    assert streamed.strip()


def test_twenty_in_parallel_equal_one_at_a_time(stack: LiveStack, sdk: openai.OpenAI) -> None:
    questions = [f"What is {i} plus {20 - i}?" for i in range(20)]
    alone = [ask(sdk, stack.model, q).choices[0].message.content for q in questions]
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda q: ask(sdk, stack.model, q).choices[0].message.content, questions))
    # Batches of another size round differently in bf16, so an answer may differ in a near-tie.
    assert sum(a == b for a, b in zip(alone, together, strict=True)) >= 18
    assert all(together)


def test_prefill_and_decode_workers_both_take_part(stack: LiveStack, sdk: openai.OpenAI) -> None:
    ask(sdk, stack.model, "What is 3 plus 4?")
    with stack.client() as http:
        metrics = http.get("/metrics").text
        roles = {w["role"] for w in http.get("/workers").json()["workers"]}
    assert roles == {"prefill", "decode"}
    assert "disaggregated" in metrics


def test_seed_repeats_and_n_choices_differ(stack: LiveStack, sdk: openai.OpenAI) -> None:
    def sample(seed: int) -> list[str]:
        answer = sdk.chat.completions.create(
            model=stack.model,
            messages=[{"role": "user", "content": "Tell me a short story."}],
            temperature=1.2,
            seed=seed,
            n=3,
            max_tokens=40,
        )
        return [choice.message.content or "" for choice in answer.choices]

    first = sample(7)
    assert len(first) == 3
    assert len(set(first)) > 1
    assert sample(7) == first


def test_tokenize_round_trip_and_models(stack: LiveStack, sdk: openai.OpenAI) -> None:
    assert [m.id for m in sdk.models.list()] == [stack.model]
    with stack.client() as http:
        for text in ("hello", "naïve café 日本 🙂"):
            tokens = http.post("/tokenize", json={"model": stack.model, "prompt": text}).json()["tokens"]
            back = http.post("/detokenize", json={"model": stack.model, "tokens": tokens}).json()["prompt"]
            assert back == text


def test_a_stop_token_ends_the_answer_and_is_named(stack: LiveStack, sdk: openai.OpenAI) -> None:
    asked: Any = {"model": stack.model, "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}
    whole: Any = sdk.completions.create(**asked, logprobs=0).choices[0]
    tokens, offsets = whole.logprobs.tokens, whole.logprobs.text_offset
    at = next(i for i in range(8, 40) if tokens[i].isascii() and tokens[i] not in tokens[:i])
    with stack.client() as http:
        (token_id,) = http.post("/tokenize", json={"prompt": tokens[at], "add_special_tokens": False}).json()["tokens"]
    asked["extra_body"] = {"stop_token_ids": [token_id]}
    cut: Any = sdk.completions.create(**asked).choices[0]
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (whole.text[: offsets[at]], "stop", token_id)
    *_, last = sdk.completions.create(**asked, stream=True)
    assert (last.choices[0].finish_reason, last.choices[0].stop_reason) == ("stop", token_id)
