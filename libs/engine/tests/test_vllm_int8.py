"""A quantized mixture of experts with latent attention and a drafter, on two real engines, whatever this CPU can do."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from engine_process import EngineProcess, started

from omni_engine.ports import DecodeJob, PrefillJob, PrefillResult, SamplingParams
from omni_engine.vllm_settings import VllmSettings

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MODEL_DIR = Path(__file__).resolve().parents[3] / "models" / "tiny-deepseek"
QUESTIONS = ("What is 3 + 4?", "What is the capital of France?", "What is the opposite of hot?", "Who are you?")
ANSWER = SamplingParams(max_tokens=24, temperature=0.0)
# Nats below the likeliest token in the mean over all answers: what 8 bits may cost where the model is undecided. Wrong
# experts, scales or blocks cost whole nats.
MEAN_REGRET = 0.05


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("compressed_tensors")
    from omni_kernels.quantize.checkpoint import read_config, weights_of, write
    from omni_kernels.quantize.choice import choose

    out = tmp_path_factory.mktemp("models") / "tiny-deepseek-w8a8"
    write(MODEL_DIR, out, choose(weights_of(MODEL_DIR), read_config(MODEL_DIR), "w8a8"))
    return out


@pytest.fixture(scope="module")
def engines(small: Path) -> Iterator[tuple[EngineProcess, EngineProcess]]:
    common: dict[str, Any] = {
        "kv_cache_gib": 0.25,
        "max_model_len": 1024,
        "enforce_eager": True,
        "speculative": "mtp:2",
    }
    first, second = sorted(os.sched_getaffinity(0))[:2]
    prefill = EngineProcess(VllmSettings(cores=str(first), **common), small, "prefill")
    decode = EngineProcess(VllmSettings(cores=str(second), **common), small, "decode")
    with started(prefill, decode):
        yield prefill, decode


def test_eight_bits_say_what_sixteen_say(engines: tuple[EngineProcess, EngineProcess]) -> None:
    import torch
    from transformers import AutoTokenizer, DeepseekV3ForCausalLM

    prefill, decode = engines
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    original = DeepseekV3ForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    regrets: list[float] = []
    for number, question in enumerate(QUESTIONS):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text)["input_ids"]
        result: PrefillResult = prefill.call("prefill", PrefillJob(f"p-{number}", ids, ANSWER))
        assert result.kv_handle is not None
        job = DecodeJob(f"d-{number}", [*ids, result.first_token_id], ANSWER, 1, result.kv_handle)
        if len(ids) % result.kv_handle.block_size == 0:
            job = DecodeJob(f"d-{number}", ids, ANSWER, 0, result.kv_handle)
        outputs = decode.generate(job)
        assert outputs[0].start is not None
        assert not outputs[0].start.fell_back
        answer = [*job.token_ids[len(ids) :], *(token for output in outputs for token in output.token_ids)]
        with torch.inference_mode():
            scores = original(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        chosen = scores.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        regrets += (scores.amax(1) - chosen).tolist()
    assert sum(regrets) / len(regrets) < MEAN_REGRET
    stats = decode.call("stats")
    assert stats.accepted_tokens > 0.3 * stats.drafted_tokens, "the drafter is quantized too, and still drafts"
