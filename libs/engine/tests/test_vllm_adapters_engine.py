"""Adapters on two real engines. The reference: transformers in float32, an adapter's weights added to the model's."""

import asyncio
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "models" / "recipe"))

from engine_process import EngineProcess, started

from omni_common.blocks import KEY_BYTES, block_keys, root_key
from omni_common.errors import FailedPrecondition, Internal
from omni_engine.adapters import AdapterTurns
from omni_engine.hosting.mirror import BlockMirror
from omni_engine.ports import DecodeJob, PrefillJob, SamplingParams, SequenceOutput
from omni_engine.vllm import VllmEngine
from omni_engine.vllm_settings import VllmSettings

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MODELS = Path(__file__).resolve().parents[3] / "models"
MODEL_DIR = MODELS / "tiny-moe"
BLOCK = 128
ADAPTERS = ("cook", "poet", "sql")
NAMES = ("", *ADAPTERS)
SLOTS = 2
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
LENGTHS = (5, 127, 129, 300)
CLEAR = 0.02
"""Between the two likeliest tokens' logits: less may fall out the other way."""
COMMON: dict[str, Any] = {"kv_cache_gib": 0.25, "max_model_len": 2048, "dtype": "float32", "enforce_eager": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    home, recipe = tmp_path_factory.mktemp("adapters"), MODELS / "recipe" / "adapter_tiny.py"
    for seed, name in enumerate(ADAPTERS):
        ranks = ["--rank", str(4 * (seed + 1))]
        command = [sys.executable, recipe, "--model", MODEL_DIR, "--out", home / name, "--seed", str(seed), *ranks]
        subprocess.run(command, check=True, timeout=60)
    return {name: home / name for name in ADAPTERS}


@pytest.fixture(scope="module")
def engines(folders: Mapping[str, Path]) -> Iterator[tuple[EngineProcess, EngineProcess]]:
    """Decode has fewer slots than there are adapters."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    prefill = EngineProcess(VllmSettings(cores=str(first), **COMMON), MODEL_DIR, "prefill", folders)
    settings = VllmSettings(cores=str(second), adapter_slots=SLOTS, **COMMON)
    decode = EngineProcess(settings, MODEL_DIR, "decode", folders)
    with started(prefill, decode):
        yield prefill, decode


@pytest.fixture(scope="module")
def references(folders: Mapping[str, Path]) -> Mapping[tuple[str, int], tuple[list[int], float]]:
    """By adapter and length of the prompt: tokens, and the least distance between the two likeliest at any of them."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from merged import add_to, greedy

    torch.set_num_threads(1)
    found = {}
    for name in NAMES:
        model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
        if name:
            add_to(model, folders[name])
        for length in LENGTHS:
            found[name, length] = greedy(model, prompt(length), GREEDY.max_tokens)
    return found


def prompt(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(300, 900) for _ in range(length)]


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def cached(outputs: list[SequenceOutput]) -> int:
    assert outputs[0].start is not None
    return outputs[0].start.cached_tokens


def check(
    references: Mapping[tuple[str, int], tuple[list[int], float]], answers: Mapping[tuple[str, int], list[int]]
) -> None:
    clear = {asked: found for asked, (found, margin) in references.items() if margin > CLEAR}
    assert len(clear) > len(references) * 2 / 3
    assert {asked: answers[asked] for asked in clear} == clear
    for length in LENGTHS:
        assert len({tuple(found) for (_, asked), (found, _) in references.items() if asked == length}) == len(NAMES)


def test_every_adapter_is_known_from_the_start(engines: tuple[EngineProcess, EngineProcess]) -> None:
    for engine, slots in zip(engines, (len(ADAPTERS), SLOTS), strict=True):
        info = engine.call("info")
        assert info.adapters == ADAPTERS
        assert 0 < info.adapter_load_ms < 5_000
        assert len(engine.call("stats").adapters) == slots


def test_one_batch_of_all_answers_like_the_merged_models(
    engines: tuple[EngineProcess, EngineProcess], references: Mapping[tuple[str, int], tuple[list[int], float]]
) -> None:
    for engine in engines:
        jobs = [DecodeJob(f"{n}-{length}", prompt(length), GREEDY, adapter=n) for n, length in references]
        answers = [tokens(outputs) for outputs in engine.generate_all(jobs)]
        check(references, dict(zip(references, answers, strict=True)))


def test_pulled_blocks_of_an_adapter_go_on_like_the_merged_model(
    engines: tuple[EngineProcess, EngineProcess], references: Mapping[tuple[str, int], tuple[list[int], float]]
) -> None:
    prefill, decode = engines
    jobs, firsts = [], []
    rest = dataclasses.replace(GREEDY, max_tokens=GREEDY.max_tokens - 1)
    for name, length in references:
        ids = prompt(length)
        # A salt of its own: nothing is found that was computed before.
        done = prefill.call("prefill", PrefillJob(f"p{name}{length}", ids, GREEDY, "pulled", adapter=name))
        assert done.kv_handle is not None and done.cached_tokens == 0
        firsts.append(done.first_token_id)
        job = DecodeJob(
            f"d{name}{length}", [*ids, done.first_token_id], rest, 1, done.kv_handle, "pulled", adapter=name
        )
        jobs.append(job)
    outputs = decode.generate_all(jobs)
    for each in outputs:
        assert each[0].start is not None and each[0].start.pulled_tokens and not each[0].start.fell_back
    answers = [[first, *tokens(each)] for first, each in zip(firsts, outputs, strict=True)]
    check(references, dict(zip(references, answers, strict=True)))


def test_blocks_of_an_adapter_are_refused_for_another(engines: tuple[EngineProcess, EngineProcess]) -> None:
    prefill, decode = engines
    assert set(prefill.call("info").weights) == set(NAMES)
    assert prefill.call("info").weights == decode.call("info").weights
    ids = prompt(200)
    done = prefill.call("prefill", PrefillJob("p-other", ids, GREEDY, adapter="cook"))
    for name in ("", "poet"):
        with pytest.raises(FailedPrecondition, match="other weights"):
            decode.generate(DecodeJob(f"d-{name}", ids, GREEDY, 0, done.kv_handle, adapter=name))
    assert prefill.call("release", done.kv_handle.lease_id)


def test_cached_blocks_are_an_adapters_own_and_told_by_its_name(engines: tuple[EngineProcess, EngineProcess]) -> None:
    _, decode = engines
    ids = [7, *prompt(2 * BLOCK)]
    told = len(decode.call("events"))
    for name in NAMES:
        assert cached(decode.generate(DecodeJob(f"first-{name}", ids, GREEDY, adapter=name))) == 0
    for name in NAMES:
        assert cached(decode.generate(DecodeJob(f"again-{name}", ids, GREEDY, adapter=name))) == 2 * BLOCK
    mirror = BlockMirror(MODEL_DIR.name, BLOCK, 1000, 1)
    for batch in decode.call("events")[told:]:
        for event in batch.events:
            mirror.apply(event)
    held = {block.key for _, blocks in mirror.pages(1000) for block in blocks}
    for name in NAMES:
        keys = block_keys(ids, BLOCK, root_key(MODEL_DIR.name, name))
        assert {keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)} <= held


def test_slots_are_told_as_they_are_used(engines: tuple[EngineProcess, EngineProcess]) -> None:
    _, decode = engines
    for name in ("sql", "cook", "", "poet"):
        decode.generate(DecodeJob(f"used-{name}", prompt(5), GREEDY, adapter=name))
    assert decode.call("stats").adapters == ("poet", "cook")


def test_many_sequences_share_few_slots(engines: tuple[EngineProcess, EngineProcess]) -> None:
    _, decode = engines
    rng = random.Random(3)
    jobs = [
        DecodeJob(
            f"many-{number}",
            prompt(rng.randrange(5, 200)),
            SamplingParams(max_tokens=rng.randrange(1, 40), temperature=1.0, ignore_eos=True),
            adapter=rng.choice(NAMES),
        )
        for number in range(80)
    ]
    for job, outputs in zip(jobs, decode.generate_all(jobs), strict=True):
        assert len(tokens(outputs)) == job.sampling.max_tokens


async def flooded(engine: VllmEngine) -> tuple[float, int, int]:
    """Seconds until 'cook' has answered while sequences of 'poet' and 'sql' overlap without end.

    Then how many of the others were sent, and how many of them ended at last.
    """
    engine._tracker.turns = AdapterTurns(SLOTS, patience_s=0.5)
    answered, ended = asyncio.Event(), [0]

    def count(outputs: Sequence[SequenceOutput]) -> None:
        ended[0] += sum(output.finish_reason is not None for output in outputs)

    async def more(number: int) -> None:
        sampling = SamplingParams(max_tokens=40 + 17 * number % 60, temperature=0.0, ignore_eos=True)
        await engine.submit(DecodeJob(f"f{number}", prompt(8), sampling, adapter=("poet", "sql")[number % 2]), count)

    for number in range(6):
        await more(number)
    while engine.stats().running < 6:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    began_s = time.monotonic()
    one = dataclasses.replace(GREEDY, max_tokens=1)
    await engine.submit(DecodeJob("cook", prompt(8), one, adapter="cook"), lambda outputs: answered.set())
    sent = 6
    while not answered.is_set() and time.monotonic() < began_s + 40:
        # Six are there at any time, until newcomers are kept out.
        if sent < ended[0] + 6:
            await more(sent)
            sent += 1
        else:
            await asyncio.sleep(0.01)
    waited_s = time.monotonic() - began_s
    async with asyncio.timeout(40):
        while ended[0] < sent:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return waited_s, sent, ended[0]


def test_a_flood_of_two_adapters_does_not_starve_a_third(engines: tuple[EngineProcess, EngineProcess]) -> None:
    """vLLM alone passes it over for as long as they come."""
    _, decode = engines
    waited_s, sent, ended = decode.run(flooded)
    assert 0.5 <= waited_s < 20
    assert sent == ended > 6
    assert decode.call("stats").waiting == 0


def test_an_adapter_that_cannot_be_loaded_ends_the_start(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """What its configuration must hold is vLLM's to know."""
    told = json.loads((folders["sql"] / "adapter_config.json").read_text())
    del told["lora_alpha"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    (tmp_path / "adapter_model.safetensors").symlink_to(folders["sql"] / "adapter_model.safetensors")
    cores = str(min(os.sched_getaffinity(0)))
    engine = EngineProcess(VllmSettings(cores=cores, **COMMON), MODEL_DIR, "both", {"broken": tmp_path})
    with pytest.raises(Internal, match=r"adapters: 'broken' cannot be loaded: .*lora_alpha"), started(engine):
        pass
