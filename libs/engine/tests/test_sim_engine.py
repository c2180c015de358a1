import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from omni_common.blocks import block_keys, root_key
from omni_common.errors import FailedPrecondition, InvalidRequest, OmniError, Unavailable
from omni_engine.hosting.mirror import BlockMirror
from omni_engine.ports import BlocksCleared, DecodeJob, FinishReason, PrefillJob, SamplingParams, SequenceOutput
from omni_engine.sim import SimEngine, SimSettings, VirtualClock

PROMPT = list(range(100, 170))


@asynccontextmanager
async def simulated(clock: VirtualClock | None = None, **values: object) -> AsyncIterator[SimEngine]:
    engine = SimEngine(SimSettings.model_validate(values), clock=clock)
    driver = asyncio.create_task(clock.run()) if clock else None
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()
        if driver:
            driver.cancel()
            await asyncio.wait({driver})


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


class Collected:
    """A sink that remembers, and says when every sequence has finished."""

    def __init__(self, expected: int = 1) -> None:
        self.outputs: list[SequenceOutput] = []
        self.done = asyncio.Event()
        self._left = expected

    def __call__(self, outputs: list[SequenceOutput]) -> None:
        self.outputs += outputs
        self._left -= sum(1 for o in outputs if o.finish_reason)
        if self._left == 0:
            self.done.set()

    @property
    def tokens(self) -> list[int]:
        return [t for o in self.outputs for t in o.token_ids]


async def generate(engine: SimEngine, job: DecodeJob) -> Collected:
    sink = Collected()
    await engine.submit(job, sink)
    async with asyncio.timeout(10):
        await sink.done.wait()
    return sink


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(SamplingParams(max_tokens=12, ignore_eos=True), id="length"),
        pytest.param(SamplingParams(max_tokens=400), id="end token"),
        pytest.param(SamplingParams(max_tokens=12, seed=7, ignore_eos=True), id="seeded"),
    ],
)
async def test_split_and_whole_give_equal_tokens(sampling):
    async with simulated(mean_output_tokens=5) as whole, simulated(mean_output_tokens=5) as decode:
        expected = await generate(whole, DecodeJob("w", PROMPT, sampling))
        async with simulated(mean_output_tokens=5) as prefill:
            first = await prefill.prefill(PrefillJob("p", PROMPT, sampling))
            rest = SamplingParams(
                max_tokens=sampling.max_tokens - 1, seed=sampling.seed, ignore_eos=sampling.ignore_eos
            )
            job = DecodeJob("p", [*PROMPT, first.first_token_id], rest, 1, first.kv_handle)
            split = await generate(decode, job)
            assert [first.first_token_id, *split.tokens] == expected.tokens
            assert split.outputs[-1].finish_reason == expected.outputs[-1].finish_reason
            start = split.outputs[0].start
            assert start is not None
            assert (start.pulled_tokens, start.fell_back) == (len(PROMPT), False)
            await until(lambda: not prefill.stats().leases)
            assert prefill.stats().kv_usage == 0


async def test_resumed_sequence_continues_where_it_broke():
    sampling = SamplingParams(max_tokens=10, ignore_eos=True)
    async with simulated() as engine:
        whole = (await generate(engine, DecodeJob("a", PROMPT, sampling))).tokens
        rest = SamplingParams(max_tokens=6, ignore_eos=True)
        resumed = await generate(engine, DecodeJob("b", PROMPT + whole[:4], rest, num_output_tokens=4))
        assert whole[:4] + resumed.tokens == whole


@given(least=st.integers(0, 40), taken=st.integers(1, 30))
@settings(max_examples=25, deadline=None)
async def test_min_tokens_of_a_continuation_are_those_to_come(least: int, taken: int) -> None:
    """What goes on elsewhere ends where the whole would have ended."""
    async with simulated(VirtualClock(), mean_output_tokens=8.0) as engine:
        asked = SamplingParams(max_tokens=60, min_tokens=least)
        whole = (await generate(engine, DecodeJob("a", PROMPT, asked))).tokens
        sent = whole[: min(taken, len(whole) - 1)]
        rest = SamplingParams(max_tokens=60 - len(sent), min_tokens=max(0, least - len(sent)))
        job = DecodeJob("b", PROMPT + sent, rest, num_output_tokens=len(sent))
        assert sent + (await generate(engine, job)).tokens == whole


async def test_prefix_cache_is_used_per_salt():
    sampling = SamplingParams(max_tokens=1)
    async with simulated(block_size=16) as engine:
        cached = []
        for name, salt in (("a", ""), ("b", ""), ("c", "other")):
            result = await engine.prefill(PrefillJob(name, PROMPT, sampling, cache_salt=salt))
            cached.append(result.cached_tokens)
        assert cached == [0, 64, 0]


async def test_blocks_of_other_weights_are_refused():
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    async with simulated(weights="old") as old, simulated(weights="old") as alike, simulated(weights="new") as new:
        done = await old.prefill(PrefillJob("a", PROMPT, sampling))
        job = DecodeJob("b", [*PROMPT, done.first_token_id], sampling, 1, done.kv_handle)
        with pytest.raises(FailedPrecondition, match="other weights") as refused:
            await new.submit(job, lambda outputs: None)
        assert refused.value.reason == "kv_mismatch"
        assert (await generate(alike, job)).outputs[0].start.pulled_tokens


async def test_lease_expires_and_can_be_released():
    clock = VirtualClock()
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    async with simulated(lease_s=3, start_s=1) as engine:
        result = await engine.prefill(PrefillJob("a", PROMPT, sampling))
        assert result.kv_handle is not None
        assert engine.stats().leases == 1
        assert await engine.release("a") is True
        assert await engine.release("a") is False
        assert engine.stats().kv_usage == 0
    async with simulated(clock, lease_s=3) as engine:
        await engine.prefill(PrefillJob("a", PROMPT, sampling))
        assert engine.stats().leases == 1
        await until(lambda: not engine.stats().leases)
        assert clock.now_s() >= 3
        assert engine.stats().kv_usage == 0


async def test_who_leaves_as_the_prompt_is_computed_leaves_no_lease():
    class LastMoment(VirtualClock):
        caller: asyncio.Task[object] | None = None

        async def sleep(self, seconds: float) -> None:
            await super().sleep(seconds)
            if self.caller is not None:
                self.caller.cancel()

    clock = LastMoment()
    async with simulated(clock) as engine:
        clock.caller = asyncio.create_task(engine.prefill(PrefillJob("p", PROMPT, SamplingParams(max_tokens=4))))
        await asyncio.wait({clock.caller})
        assert clock.caller.cancelled()
        await until(lambda: engine.stats().running == 0)
        assert (engine.stats().leases, engine.stats().kv_usage) == (0, 0)


async def test_an_abort_ends_the_lease():
    sampling = SamplingParams(max_tokens=5, ignore_eos=True)
    async with simulated() as prefill, simulated() as decode:
        result = await prefill.prefill(PrefillJob("a", PROMPT, sampling))
        await decode.submit(DecodeJob("a", PROMPT, sampling, kv_handle=result.kv_handle), lambda outputs: None)
        assert prefill.stats().leases == 1
        await decode.abort(["a"])
        await until(lambda: not prefill.stats().leases)
        assert prefill.stats().kv_usage == decode.stats().kv_usage == 0


@pytest.mark.parametrize("fault", ["refused on purpose", "holder gone", "lease gone"])
async def test_failed_pull_falls_back_to_local_prefill(fault):
    sampling = SamplingParams(max_tokens=5, ignore_eos=True)
    async with simulated() as decode, simulated() as prefill:
        expected = (await generate(decode, DecodeJob("w", PROMPT, sampling, cache_salt="x"))).tokens
        first = await prefill.prefill(PrefillJob("p", PROMPT, sampling))
        if fault == "refused on purpose":
            decode.faults.fail_pulls = 1.0
        elif fault == "lease gone":
            await prefill.release("p")
        else:
            await prefill.close()
        got = await generate(decode, DecodeJob("p", PROMPT, sampling, 0, first.kv_handle))
        start = got.outputs[0].start
        assert start is not None
        assert (start.fell_back, start.pulled_tokens) == (True, 0)
        assert got.tokens == expected
        assert decode.stats().kv_usage == 0


async def test_death_ends_everything():
    async with simulated() as engine:
        sink = Collected()
        await engine.submit(DecodeJob("d", PROMPT, SamplingParams(max_tokens=1000, ignore_eos=True)), sink)
        prefill = asyncio.create_task(engine.prefill(PrefillJob("p", PROMPT, SamplingParams(max_tokens=2))))
        await asyncio.sleep(0)
        engine.die("test")
        assert await engine.wait_dead() == "test"
        with pytest.raises(Unavailable):
            await prefill
        assert sink.outputs[-1].finish_reason is FinishReason.ERROR
        with pytest.raises(Unavailable):
            await engine.submit(DecodeJob("e", PROMPT, SamplingParams(max_tokens=1)), sink)


async def test_die_after_and_failing_prefill_faults():
    clock = VirtualClock()
    async with simulated(clock, faults={"die_after_s": 60, "fail_next_prefills": 1}) as engine:
        with pytest.raises(Unavailable):
            await engine.prefill(PrefillJob("p", PROMPT, SamplingParams(max_tokens=2)))
        await engine.prefill(PrefillJob("p", PROMPT, SamplingParams(max_tokens=2)))
        assert "on purpose" in await engine.wait_dead()


@pytest.mark.parametrize("tokens", [[], list(range(64))])
async def test_prompts_that_do_not_fit_are_refused(tokens):
    async with simulated(max_model_len=64) as engine:
        with pytest.raises(InvalidRequest):
            await engine.submit(DecodeJob("a", tokens, SamplingParams(max_tokens=1)), Collected())


async def test_step_times_follow_the_model():
    clock = VirtualClock()
    timing = {"prefill_base_ms": 10, "prefill_token_ms": 1, "prefill_context_ms": 0, "step_base_ms": 5}
    timing |= {"step_sequence_ms": 1, "step_context_ms": 0}
    async with simulated(clock, timing=timing) as engine:
        sink = await generate(engine, DecodeJob("a", PROMPT, SamplingParams(max_tokens=3, ignore_eos=True)))
    start = sink.outputs[0].start
    assert start is not None
    assert start.timings.compute_ms == pytest.approx(10 + len(PROMPT))
    assert clock.now_s() * 1e3 >= 80 + 2 * 6


async def test_chunks_share_steps_and_preemption_keeps_tokens():
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    prompts = [list(range(i, i + 30)) for i in range(6)]
    async with simulated(VirtualClock()) as roomy:
        expected = [(await generate(roomy, DecodeJob(str(i), p, sampling))).tokens for i, p in enumerate(prompts)]
    async with simulated(
        VirtualClock(), block_size=4, num_blocks=40, max_model_len=128, max_num_batched_tokens=16
    ) as tight:
        sink = Collected(len(prompts))
        for i, prompt in enumerate(prompts):
            await tight.submit(DecodeJob(str(i), prompt, sampling), sink)
        async with asyncio.timeout(20):
            await sink.done.wait()
        for i, tokens in enumerate(expected):
            assert [t for o in sink.outputs if o.request_id == str(i) for t in o.token_ids] == tokens
        assert tight.stats().kv_usage == 0


JOBS = st.lists(
    st.tuples(
        st.integers(1, 60),  # prompt length
        st.integers(1, 20),  # max_tokens
        st.sampled_from(["decode", "prefill", "prefill, cancelled", "decode, aborted"]),
        st.integers(0, 30),  # turns of the loop until it is ended early
    ),
    min_size=1,
    max_size=12,
)


@given(JOBS)
@example([(1, 1, "decode", 0), (1, 16, "decode, aborted", 0), (36, 10, "decode", 0), (22, 9, "decode", 0),
          (1, 1, "decode", 0), (37, 9, "decode", 0), (17, 14, "decode, aborted", 12), (60, 5, "decode", 0),
          (36, 5, "decode", 0), (2, 1, "decode", 0)])  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_blocks_return_to_zero_and_events_mirror_the_cache(jobs):
    async def scenario() -> None:
        limits = {"block_size": 4, "num_blocks": 32, "max_model_len": 96, "max_num_batched_tokens": 24}
        async with simulated(VirtualClock(), lease_s=0.5, **limits) as engine:
            mirror = BlockMirror("sim", 4, 10_000)
            follower = asyncio.create_task(follow(engine, mirror))
            await asyncio.sleep(0)
            async with asyncio.TaskGroup() as group:
                for number, job in enumerate(jobs):
                    group.create_task(run_one(engine, number, *job))
            await until(lambda: not engine.stats().kv_usage)
            assert engine.stats().leases == engine.stats().running == engine.stats().waiting == 0
            for _ in range(10):
                await asyncio.sleep(0)
            probe = [*range(40)]  # begins like every third job
            known = prefix_of(probe, mirror)
            result = await engine.prefill(PrefillJob("probe", probe, SamplingParams(max_tokens=1)))
            # The last token is always computed, so that of a prompt known as a whole the last block is.
            assert result.cached_tokens == min(4 * known, 36)
            for _ in range(10):
                await asyncio.sleep(0)
            assert prefix_of(probe, mirror) == 10
            assert len(mirror) <= 32
            assert not mirror.skipped
            follower.cancel()

    asyncio.run(scenario())


def prefix_of(tokens: list[int], mirror: BlockMirror) -> int:
    """Leading blocks of a prompt that the mirror has."""
    held = {block.key for _, blocks in mirror.pages(100) for block in blocks}
    keys = block_keys(tokens, 4, root_key("sim"))
    names = [keys[i : i + 16] for i in range(0, len(keys), 16)]
    return sum(1 for _ in itertools.takewhile(held.__contains__, names))


async def follow(engine: SimEngine, mirror: BlockMirror) -> None:
    async for batch in engine.events():
        for event in batch.events:
            assert not isinstance(event, BlocksCleared)
            mirror.apply(event)


async def run_one(engine: SimEngine, number: int, length: int, max_tokens: int, kind: str, turns: int) -> None:
    prompt = [number % 3 + i for i in range(length)]
    sampling = SamplingParams(max_tokens=max_tokens)
    if kind.startswith("prefill"):
        task = asyncio.create_task(engine.prefill(PrefillJob(f"r{number}", prompt, sampling)))
        if "cancelled" in kind:
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
        try:
            await task
        except (asyncio.CancelledError, OmniError):
            return
        return
    sink = Collected()
    await engine.submit(DecodeJob(f"r{number}", prompt, sampling), sink)
    if "aborted" in kind:
        for _ in range(turns):
            await asyncio.sleep(0)
        await engine.abort([f"r{number}"])
        seen = len(sink.outputs)
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(sink.outputs) == seen
        return
    async with asyncio.timeout(10):
        await sink.done.wait()


@pytest.mark.parametrize("content", ["", "{nope", "[1]"])
def test_a_broken_config_of_the_model_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InvalidRequest, match=r"model_dir: .*config\.json"):
        SimSettings().for_model(tmp_path)
