"""Two real vLLM engines started for any role: each prefills for the other."""

import dataclasses
import random
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

MODEL_DIR = Path(__file__).resolve().parents[3] / "models" / "tiny-moe"
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[EngineProcess, EngineProcess]]:
    common: dict[str, Any] = {"kv_cache_gib": 0.25, "max_model_len": 2048, "enforce_eager": True, "any_role": True}
    one = EngineProcess(VllmSettings(cores="0", **common), MODEL_DIR, "prefill")
    other = EngineProcess(VllmSettings(cores="1", **common), MODEL_DIR, "decode")
    with started(one, other):
        yield one, other


@pytest.mark.parametrize("number", range(4))
def test_each_pulls_what_the_other_computed(engines: tuple[EngineProcess, EngineProcess], number: int) -> None:
    prefill, decode = engines[number % 2], engines[1 - number % 2]
    rng = random.Random(number)
    ids = [rng.randrange(300, 900) for _ in range(300)]
    salt = str(number)
    result: PrefillResult = prefill.call("prefill", PrefillJob("p", ids, GREEDY, salt))
    assert result.kv_handle is not None
    rest = dataclasses.replace(GREEDY, max_tokens=GREEDY.max_tokens - 1)
    outputs = decode.generate(DecodeJob("d", [*ids, result.first_token_id], rest, 1, result.kv_handle, salt))
    start = outputs[0].start
    assert start is not None
    assert not start.fell_back
    assert start.pulled_tokens + start.cached_tokens >= len(ids)
    assert sum(len(output.token_ids) for output in outputs) == rest.max_tokens
