"""Two real vLLM engines: what one computes the other pulls. Runs on every vLLM the adapter supports."""

import dataclasses
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from engine_process import EngineProcess, started

from omni_common.errors import FailedPrecondition, InvalidRequest
from omni_engine.ports import (
    BlocksStored,
    DecodeJob,
    FinishReason,
    KvHandle,
    PrefillJob,
    PrefillResult,
    SamplingParams,
    SequenceOutput,
)
from omni_engine.vllm_settings import VllmSettings
from omni_engine.weights import weights_digest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MODEL_DIR = Path(__file__).resolve().parents[3] / "models" / "tiny-moe"
BLOCK = 128
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=2)
# Two orders of summation in bf16 may differ by this much.
NOISE = 0.25


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[EngineProcess, EngineProcess]]:
    common: dict[str, Any] = {"kv_cache_gib": 0.25, "max_model_len": 4096, "enforce_eager": True}
    prefill = EngineProcess(VllmSettings(cores="0", **common), MODEL_DIR, "prefill")
    decode = EngineProcess(VllmSettings(cores="1", **common), MODEL_DIR, "decode")
    with started(prefill, decode):
        yield prefill, decode


def prompt(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(300, 900) for _ in range(length)]


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def continued(result: PrefillResult, ids: list[int], name: str) -> DecodeJob:
    rest = dataclasses.replace(GREEDY, max_tokens=GREEDY.max_tokens - 1)
    return DecodeJob(name, [*ids, result.first_token_id], rest, 1, result.kv_handle)


def eventually(engine: EngineProcess, name: str, value: float) -> None:
    deadline = time.monotonic() + 20
    while (seen := getattr(engine.call("stats"), name)) != value:
        assert time.monotonic() < deadline, f"{name} stays {seen}"


def same_until_near_tie(seen: list[int], alone: list[SequenceOutput]) -> bool:
    for i, (token, expected) in enumerate(zip(seen, tokens(alone), strict=True)):
        if token != expected:
            found = alone[i].logprobs
            assert found is not None
            best, second = sorted(found.logprobs[1:], reverse=True)[:2]
            return best - second < NOISE
    return True


@pytest.mark.parametrize("length", [2, 100, 127, 200, 255, 300, 1500])
def test_pulled_blocks_continue_as_if_computed_here(engines: tuple[EngineProcess, EngineProcess], length: int) -> None:
    prefill, decode = engines
    ids = prompt(length)
    alone = decode.generate(DecodeJob(f"alone-{length}", ids, GREEDY, cache_salt="alone"))
    result: PrefillResult = prefill.call("prefill", PrefillJob(f"p-{length}", ids, GREEDY))
    assert result.kv_handle is not None
    assert result.kv_handle.num_blocks == -(-length // BLOCK)
    outputs = decode.generate(continued(result, ids, f"d-{length}"))
    assert same_until_near_tie([result.first_token_id, *tokens(outputs)], alone)
    start = outputs[0].start
    assert start is not None
    assert not start.fell_back
    assert start.pulled_tokens + start.cached_tokens >= length
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_a_full_last_block_is_pulled_without_the_first_token(engines: tuple[EngineProcess, EngineProcess]) -> None:
    prefill, decode = engines
    ids = prompt(2 * BLOCK)
    result: PrefillResult = prefill.call("prefill", PrefillJob("p-full", ids, GREEDY))
    with pytest.raises(FailedPrecondition, match="do not fit"):
        decode.generate(continued(result, ids, "d-full"))
    outputs = decode.generate(DecodeJob("d-full-again", ids, GREEDY, 0, result.kv_handle))
    assert outputs[0].token_ids[0] == result.first_token_id


def test_leases_end_by_pull_and_by_release(engines: tuple[EngineProcess, EngineProcess]) -> None:
    prefill, decode = engines
    ids = prompt(180)
    result: PrefillResult = prefill.call("prefill", PrefillJob("p-lease", ids, GREEDY))
    assert result.kv_handle is not None
    assert prefill.call("stats").leases >= 1
    assert prefill.call("release", result.kv_handle.lease_id)
    assert not prefill.call("release", result.kv_handle.lease_id)
    assert not prefill.call("release", "never-was")
    prefill.call("prefill", PrefillJob("p-unseen", prompt(182), GREEDY))
    assert prefill.call("release", "p-unseen"), "by the request's name, for who did not see the answer"
    began_s = time.time()
    pulled: PrefillResult = prefill.call("prefill", PrefillJob("p-pulled", prompt(181), GREEDY))
    assert pulled.kv_handle is not None
    granted_s = pulled.kv_handle.lease_ends_unix_ms / 1e3 - pulled.kv_handle.lease_s
    assert began_s - 0.001 <= granted_s <= time.time()
    decode.generate(continued(pulled, prompt(181), "d-pulled"))
    for name in ("leases", "kv_usage"):
        eventually(prefill, name, 0)
        eventually(decode, name, 0)


def test_what_is_pulled_after_its_lease_is_not_used(engines: tuple[EngineProcess, EngineProcess]) -> None:
    """The holder's blocks are another prompt's by the time of the pull, as after a lease that ran out."""
    prefill, decode = engines
    ids, others = prompt(330), prompt(331)[:330]
    alone = tokens(decode.generate(DecodeJob("alone-late", ids, GREEDY, cache_salt="alone")))

    def pulled(name: str, left_s: float, lease_s: float = 60) -> list[SequenceOutput]:
        result: PrefillResult = prefill.call("prefill", PrefillJob(f"p-{name}", others, GREEDY))
        assert result.kv_handle is not None
        ends_ms = int((time.time() + left_s) * 1000)
        handle = dataclasses.replace(result.kv_handle, lease_ends_unix_ms=ends_ms, lease_s=lease_s)
        return decode.generate(DecodeJob(f"d-{name}", ids, GREEDY, 0, handle, cache_salt=name))

    in_time, late, of_the_future = pulled("in-time", 60), pulled("late", 0), pulled("future", 60, lease_s=30)
    again = decode.generate(DecodeJob("again-late", ids, GREEDY, cache_salt="late"))
    starts = [outputs[0].start for outputs in (in_time, late, of_the_future, again)]
    assert [start and start.fell_back for start in starts] == [False, True, True, False]
    assert starts[3] is not None
    assert starts[3].cached_tokens == 2 * BLOCK
    assert tokens(in_time) != alone, "blocks of another prompt do no harm: the test tells nothing"
    assert tokens(late) == tokens(of_the_future) == tokens(again) == alone


def test_an_abort_frees_the_blocks(engines: tuple[EngineProcess, EngineProcess]) -> None:
    _, decode = engines
    long = dataclasses.replace(GREEDY, max_tokens=2000)
    decode.call("submit_and_abort", DecodeJob("gone", prompt(500), long))
    for name in ("running", "waiting", "queued_tokens", "kv_usage"):
        eventually(decode, name, 0)


def test_an_abort_ends_the_lease(engines: tuple[EngineProcess, EngineProcess]) -> None:
    """Whoever sent the sequence may not: the engine could be reading."""
    prefill, decode = engines
    ids = prompt(310)
    result: PrefillResult = prefill.call("prefill", PrefillJob("p-aborted", ids, GREEDY))
    decode.call("submit_and_abort", continued(result, ids, "d-aborted"))
    for name in ("leases", "kv_usage"):
        eventually(prefill, name, 0)


def test_steps_are_counted_and_timed(engines: tuple[EngineProcess, EngineProcess]) -> None:
    _, decode = engines
    before = decode.call("stats")
    began = time.monotonic()
    decode.generate(DecodeJob("steps", prompt(60), dataclasses.replace(GREEDY, max_tokens=40)))
    took_ms = (time.monotonic() - began) * 1e3
    eventually(decode, "context_tokens", 0)
    after = decode.call("stats")
    assert 38 <= after.steps - before.steps <= 40
    assert 0.3 * took_ms < after.busy_ms - before.busy_ms <= took_ms
    assert after.queued_tokens == 0


def test_seeded_sampling_repeats(engines: tuple[EngineProcess, EngineProcess]) -> None:
    _, decode = engines
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=11, ignore_eos=True)
    ids = prompt(50)
    first, again = (tokens(decode.generate(DecodeJob(f"seed-{i}", ids, params, cache_salt=str(i)))) for i in range(2))
    assert first == again


@pytest.mark.parametrize(
    ("job", "names"),
    [
        pytest.param(DecodeJob("long", prompt(5000), GREEDY), "4096", id="longer than the model"),
        pytest.param(DecodeJob("empty", [], GREEDY), "prompt", id="empty"),
    ],
)
def test_prompts_the_engine_cannot_hold_are_refused(
    engines: tuple[EngineProcess, EngineProcess], job: DecodeJob, names: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"(?i){names}"):
        engines[1].generate(job)


def test_a_handle_of_another_block_size_is_refused(engines: tuple[EngineProcess, EngineProcess]) -> None:
    handle = KvHandle(b"{}", "other", "lease", 10, 1, 16, 30.0)
    with pytest.raises(FailedPrecondition, match="block size"):
        engines[1].generate(DecodeJob("mismatch", prompt(10), GREEDY, 0, handle))


def test_blocks_of_other_weights_are_refused(engines: tuple[EngineProcess, EngineProcess]) -> None:
    prefill, decode = engines
    assert prefill.call("info").weights == decode.call("info").weights == {"": weights_digest(MODEL_DIR)}
    ids = prompt(BLOCK + 9)
    handle = prefill.call("prefill", PrefillJob("p-weights", ids, GREEDY)).kv_handle
    told = json.loads(handle.opaque)
    other = dataclasses.replace(handle, opaque=json.dumps(told | {"omni_weights": "another's"}).encode())
    with pytest.raises(FailedPrecondition, match="other weights") as refused:
        decode.generate(DecodeJob("d-weights", ids, GREEDY, 0, other))
    assert refused.value.reason == "kv_mismatch"
    assert decode.generate(DecodeJob("d-weights-again", ids, GREEDY, 0, handle))[0].start.pulled_tokens


def test_block_events_name_the_tokens_stored(engines: tuple[EngineProcess, EngineProcess]) -> None:
    prefill, _ = engines
    ids = prompt(3 * BLOCK + 5)
    prefill.call("prefill", PrefillJob("p-events", ids, GREEDY))
    deadline = time.monotonic() + 10
    while True:
        stored = [e for b in prefill.call("events") for e in b.events if isinstance(e, BlocksStored)]
        if any(list(e.token_ids) == ids[: 3 * BLOCK] for e in stored):
            break
        assert time.monotonic() < deadline, "no event for the prompt"
    sequences = [b.sequence for b in prefill.call("events")]
    assert sequences == list(range(sequences[0], sequences[0] + len(sequences)))


def test_zz_a_dead_prefill_engine_costs_a_local_prefill_only(engines: tuple[EngineProcess, EngineProcess]) -> None:
    """Last, since it ends the prefill engine. Its own processes end with it."""
    prefill, decode = engines
    ids = prompt(190)
    alone = decode.generate(DecodeJob("alone-dead", ids, GREEDY, cache_salt="alone"))
    result: PrefillResult = prefill.call("prefill", PrefillJob("p-dead", ids, GREEDY))
    orphans = prefill.children()
    prefill.kill()
    deadline = time.monotonic() + 20
    while any(p.is_running() and p.status() != "zombie" for p in orphans):
        assert time.monotonic() < deadline, "engine processes outlive their service"
    outputs = decode.generate(continued(result, ids, "d-dead"))
    assert outputs[0].start is not None
    assert outputs[0].start.fell_back
    assert same_until_near_tie([result.first_token_id, *tokens(outputs)], alone)
    eventually(decode, "kv_usage", 0)
