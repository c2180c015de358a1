"""What a worker on vLLM says of its load, from what the engine core reports each step. No vLLM is started."""

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from engine_steps import Output, Step

from omni_engine.adapters import AdapterTurns
from omni_engine.ports import DecodeJob, KvHandle, PrefillJob, SamplingParams
from omni_engine.vllm_outputs import PendingPrefill, RunningSequence, Tracker

PARAMS = SamplingParams(max_tokens=8)


def sequence(name: str, tokens: int, believed: int | None = None) -> RunningSequence:
    job = DecodeJob(name, range(tokens), PARAMS, uncached_tokens=believed)
    return RunningSequence(name, name, tokens, job.believed_tokens, 0.0, lambda _: None, expects_pull=False)


async def prefill(name: str, tokens: int, believed: int | None = None) -> PendingPrefill:
    job = PrefillJob(name, range(tokens), PARAMS, uncached_tokens=believed)
    return PendingPrefill(name, name, job.believed_tokens, 0.0, asyncio.get_running_loop().create_future())


def handle(tokens: int) -> KvHandle:
    return KvHandle(b"", "e", "l", tokens, 1, 16, 30.0)


@pytest.mark.parametrize(
    ("job", "believed"),
    [
        pytest.param(PrefillJob("p", range(100), PARAMS), 100, id="nobody knows"),
        pytest.param(PrefillJob("p", range(100), PARAMS, uncached_tokens=30), 30, id="mostly cached"),
        pytest.param(PrefillJob("p", range(100), PARAMS, uncached_tokens=900), 100, id="no more than there are"),
        pytest.param(DecodeJob("d", range(100), PARAMS), 100, id="computed here"),
        pytest.param(DecodeJob("d", range(101), PARAMS, 1, handle(100)), 1, id="pulled"),
        pytest.param(DecodeJob("d", range(100), PARAMS, 1, handle(100), uncached_tokens=40), 40, id="said to be 40"),
    ],
)
def test_believed_tokens(job: PrefillJob | DecodeJob, believed: int) -> None:
    assert job.believed_tokens == believed


async def test_cached_tokens_are_not_queued() -> None:
    tracker = Tracker()
    tracker.add(await prefill("p", 1000, believed=10))
    tracker.add(sequence("d", 500, believed=0))
    tracker.add(sequence("e", 70))
    assert tracker.stats(0).queued_tokens == 80
    tracker.step(Step(1.0, [Output("p", [1]), Output("e", [2])]))
    assert tracker.stats(0).queued_tokens == 0
    tracker.drop("d")
    assert tracker.stats(0).queued_tokens == 0


async def test_what_is_kept_out_waits_and_is_given_to_vllm_once() -> None:
    tracker = Tracker(turns=AdapterTurns(1, patience_s=1.0))
    works = [sequence(name, 10) for name in ("a1", "b1", "a2", "left", "a4")] + [await prefill("a3", 10)]
    for work, submitted_s in zip(works, (0.0, 0.5, 2.0, 2.0, 2.0, 2.0), strict=True):
        work.adapter, work.submitted_s = work.core_id[0].replace("l", "a"), submitted_s
    assert [tracker.add(work, work.core_id.upper()) for work in works[:2]] == [True, True]
    tracker.step(Step(0.6, [Output("a1", [1])]))
    assert [tracker.add(work, work.core_id.upper()) for work in works[2:]] == [False] * 4, "b has waited for long"
    assert tracker.stats(0).waiting == 4
    assert tracker.stats(0).queued_tokens == 50
    assert not list(tracker.admitted(2.0))
    tracker.drop("left")
    tracker.step(Step(2.5, [Output("a1", [1], "stop")]))
    assert not list(tracker.admitted(2.5))
    tracker.step(Step(3.0, [Output("b1", [1])]))
    going = tracker.admitted(3.0)
    assert next(going) == "A2"
    tracker.drop("a4")
    assert list(going) == ["A3"], "a4 left while a2 was given to vLLM"
    assert not list(tracker.admitted(3.0))
    assert tracker.stats(0).waiting == 0
    tracker.step(Step(4.0, [Output("b1", [1], "stop"), Output("a3", [1], "length"), Output("a2", [1], "length")]))
    assert not tracker.has_work


async def test_a_prompt_whose_caller_is_just_leaving_is_nobodys() -> None:
    """Its lease would be known to none."""
    tracker = Tracker()
    tracker.add(left := await prefill("p", 10))
    tracker.add(stays := await prefill("q", 10))
    left.done.cancel()
    step = Step(1.0, [Output("p", [1], "length"), Output("q", [2], "length")])
    assert tracker.step(step) == step.outputs[:1]
    assert stays.done.result() == (step.outputs[1], 1.0)
    assert not tracker.has_work
    assert tracker.stats(0).queued_tokens == 0


def test_context_is_that_of_the_sequences_that_generate() -> None:
    tracker = Tracker()
    tracker.add(sequence("a", 100))
    tracker.add(sequence("b", 50))
    assert tracker.stats(0).context_tokens == 0
    tracker.step(Step(1.0, [Output("a", [1])]))
    assert tracker.stats(0).context_tokens == 101
    tracker.step(Step(1.1, [Output("a", [1, 2]), Output("b", [1])]))
    assert tracker.stats(0).context_tokens == 154
    tracker.step(Step(1.2, [Output("a", [3], "length")]))
    assert tracker.stats(0).context_tokens == 51
    tracker.drop("b")
    tracker.drop("b")
    assert tracker.stats(0).context_tokens == 0


def test_the_time_of_steps_counts_while_there_is_work() -> None:
    tracker = Tracker()
    tracker.add(sequence("a", 10))
    tracker.step(Step(5.0, [Output("a", [1])]))
    assert tracker.stats(0).steps == 0, "how long the first one took is not known"
    tracker.step(Step(5.02, [Output("a", [2])]))
    tracker.step(Step(5.05))
    assert tracker.stats(0).steps == 1, "a step without tokens does not count"
    tracker.step(Step(5.09, [Output("a", [3], "length")]))
    stats = tracker.stats(0)
    assert (stats.steps, stats.busy_ms) == (2, pytest.approx(60))
    tracker.add(sequence("b", 10))
    tracker.step(Step(5.5, [Output("b", [1])]))
    assert tracker.stats(0).steps == 2, "the engine was idle before"
    tracker.drop("b")
    tracker.add(sequence("c", 10))
    tracker.step(Step(5.9, [Output("c", [1])]))
    tracker.step(Step(5.91, [Output("c", [2], "stop")]))
    assert tracker.stats(0).busy_ms == pytest.approx(70)


async def test_a_dead_engine_leaves_no_load() -> None:
    tracker = Tracker()
    tracker.add(await prefill("p", 100))
    tracker.add(sequence("a", 100))
    tracker.step(Step(1.0, [Output("a", [1])]))
    tracker.fail_all("gone")
    stats = tracker.stats(0)
    assert (stats.queued_tokens, stats.context_tokens, stats.running, stats.waiting) == (0, 0, 0, 0)
