"""Adapters where no real engine is needed: names, slots, what a worker refuses and tells, the simulated engine."""

import asyncio
import heapq
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from decode_client import PROMPT, session

from omni.engine.v1 import engine_pb2
from omni.engine.v1.worker_service_pb2 import DescribeRequest, WatchStatsRequest
from omni.prefill.v1.prefill_service_pb2 import PrefillRequest
from omni_common.blocks import block_keys, root_key
from omni_common.errors import FailedPrecondition, InvalidRequest
from omni_common.rpc_errors import from_rpc_error
from omni_engine.adapters import PATIENCE_S, AdapterSlots, AdapterTurns, checked_name
from omni_engine.hosting.mirror import BlockMirror
from omni_engine.hosting.settings import WorkerSettings
from omni_engine.ports import DecodeJob, PrefillJob, SamplingParams
from omni_engine.sim import SimEngine, SimSettings, VirtualClock

SERVED = {"poet": "/models/poet", "sql": "/models/sql"}


class Settings(WorkerSettings):
    service = "prefill"


@pytest.mark.parametrize("name", ["a", "sql", "org/sql-v1.2:latest", "7b_lora", "a" * 128])
def test_names(name: str) -> None:
    assert checked_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", "/a", "a b", "a\n", "ä", "a" * 129])
def test_names_that_no_client_could_ask_for(name: str) -> None:
    with pytest.raises(ValueError, match="write a letter or digit"):
        checked_name(name)


def test_settings_name_adapters_sorted() -> None:
    given = '{"sql": "/models/sql", "poet": "/models/poet"}'
    parsed = Settings.load({"OMNI_PREFILL_ADAPTERS": given})
    assert list(parsed.adapters.items()) == [(name, Path(path)) for name, path in SERVED.items()]


@pytest.mark.parametrize(
    ("adapters", "why"),
    [
        pytest.param('{"s ql": "/a"}', "OMNI_PREFILL_ADAPTERS.*'s ql'", id="name"),
        pytest.param(
            '{"tiny": "/a"}',
            r"'adapters' .*\(OMNI_PREFILL_ADAPTERS\): 'tiny' is the model's own",
            id="the model's name",
        ),
    ],
)
def test_settings_refuse(adapters: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        Settings.load({"OMNI_PREFILL_ADAPTERS": adapters, "OMNI_PREFILL_SERVED_MODEL_NAME": "tiny"})


@pytest.mark.parametrize(
    ("model", "name"),
    [
        pytest.param({"OMNI_PREFILL_MODEL_DIR": "/models/tiny"}, "tiny", id="folder"),
        pytest.param({}, "sim", id="no model"),
    ],
)
def test_settings_refuse_an_adapter_named_as_the_model_is_by_default(model: dict[str, str], name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"'{name}' is the model's own name") as refused:
        Settings.load({"OMNI_PREFILL_ADAPTERS": f"{{{name}: /a}}", **model})
    assert refused.value.field == "adapters"


def test_slots_hold_those_in_use_and_then_the_last_used() -> None:
    slots = AdapterSlots(2)
    for name in ("a", "", "b"):
        slots.enter(name)
    assert slots.names == ("a", "b")
    slots.leave("")
    slots.leave("a")
    assert slots.names == ("b", "a")
    slots.enter("c")
    assert slots.names == ("b", "c"), "the idle one made room"
    slots.leave("b")
    slots.leave("c")
    assert slots.names == ("c", "b")


@given(size=st.integers(1, 4), steps=st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=60))
def test_slots_are_never_more_than_there_are(size: int, steps: list[tuple[str, bool]]) -> None:
    slots, users = AdapterSlots(size), list[str]()
    for name, leaves in steps:
        if leaves and name in users:
            users.remove(name)
            slots.leave(name)
        elif not leaves:
            users.append(name)
            slots.enter(name)
        told = slots.names
        assert len(set(told)) == len(told) <= size
        in_use = len(set(users))
        assert set(told[:in_use]) <= set(users), "those in use come first"
        assert len(set(told) & set(users)) == min(in_use, size)


class SlottedEngine:
    """Begins who finds a slot, first come first served, and passes over the others, as vLLM does."""

    def __init__(self, slots: int, turns: AdapterTurns[int]) -> None:
        self._slots = slots
        self._turns = turns
        self._came: list[tuple[float, str, float]] = []
        self._waiting: list[int] = []
        self._running: list[tuple[float, int]] = []
        self.waited_s: dict[int, float] = {}

    def run(self, work: Sequence[tuple[float, str, float]]) -> None:
        """Arrival, adapter and duration of each piece, by arrival."""
        for came_s, adapter, takes_s in work:
            self._until(came_s)
            key = len(self._came)
            self._came.append((came_s, adapter, takes_s))
            if self._turns.comes(key, adapter, came_s):
                self._waiting.append(key)
            self._begin(came_s)
        while self._running:
            self._until(self._running[0][0])

    def _until(self, now_s: float) -> None:
        while self._running and self._running[0][0] <= now_s:
            ended_s, key = heapq.heappop(self._running)
            self._turns.leaves(key)
            self._begin(ended_s)

    def _begin(self, now_s: float) -> None:
        in_use = Counter(self._came[key][1] for _, key in self._running if self._came[key][1])
        self._waiting += self._turns.admitted(now_s)
        for key in list(self._waiting):
            came_s, adapter, takes_s = self._came[key]
            if adapter and adapter not in in_use and len(in_use) == self._slots:
                continue
            in_use[adapter] += bool(adapter)
            self._waiting.remove(key)
            heapq.heappush(self._running, (now_s + takes_s, key))
            self._turns.begins(key, now_s)
            self.waited_s[key] = now_s - came_s
        self._waiting += self._turns.admitted(now_s)


WORK = st.lists(
    st.tuples(st.floats(0.0, 0.5), st.sampled_from(("", "a", "a", "a", "b", "b", "c", "d")), st.floats(0.1, 2.0)),
    max_size=150,
)


@settings(deadline=None)
@given(slots=st.integers(1, 3), gaps=WORK)
def test_nobody_waits_for_a_slot_for_ever(slots: int, gaps: list[tuple[float, str, float]]) -> None:
    """Each adapter gets its turn within the others' patience and work, however much more of theirs comes."""
    patience_s, now_s, work = 3.0, 0.0, list[tuple[float, str, float]]()
    for gap_s, adapter, takes_s in gaps:
        now_s += gap_s
        work.append((now_s, adapter, takes_s))
    turns = AdapterTurns[int](slots, patience_s)
    engine = SlottedEngine(slots, turns)
    engine.run(work)
    assert len(engine.waited_s) == len(work), "whoever was kept out came in"
    assert turns.kept_out == 0
    assert all(engine.waited_s[key] == 0 for key, (_, adapter, _) in enumerate(work) if not adapter)
    assert max(engine.waited_s.values(), default=0.0) <= 4 * (patience_s + 2.0)


def test_without_turns_one_adapter_can_keep_all_others_out() -> None:
    """What the test above would find otherwise, with the same engine."""
    work = [(number / 10, "a", 0.3) for number in range(600)]
    work.insert(100, (10.0, "b", 0.3))
    for patience_s, least_s, most_s in ((1e9, 50.0, 51.0), (3.0, 3.0, 3.3)):
        engine = SlottedEngine(1, AdapterTurns(1, patience_s))
        engine.run(work)
        assert least_s <= engine.waited_s[100] <= most_s


def test_only_more_adapters_than_slots_keep_anybody_out() -> None:
    turns = AdapterTurns[str](2, patience_s=1.0)
    assert turns.comes("1", "a", 0.0)
    assert turns.comes("2", "b", 0.0)
    assert all(turns.comes(str(number), "ab"[number % 2], float(number)) for number in range(3, 9))
    assert not turns.comes("9", "c", 9.0), "a starves: it has waited 9 s and nothing of it runs"
    turns.leaves("9")
    assert turns.kept_out == 0


async def test_a_flood_of_one_adapter_does_not_starve_another() -> None:
    """One slot: sequences of 'a' overlap without end until the one of 'b' has answered."""
    clock = VirtualClock()
    engine = SimEngine(SimSettings(adapter_slots=1, mean_output_tokens=1000), clock=clock, adapters=("a", "b"))
    driver = asyncio.create_task(clock.run())
    await engine.start()
    answered, flood = asyncio.Event(), SamplingParams(max_tokens=50, ignore_eos=True)
    await engine.submit(DecodeJob("a0", range(64), flood, adapter="a"), lambda outputs: None)
    await clock.sleep(0.1)
    began_s = clock.now_s()
    one = SamplingParams(max_tokens=1, ignore_eos=True)
    await engine.submit(DecodeJob("b", range(64), one, adapter="b"), lambda outputs: answered.set())
    number = 0
    async with asyncio.timeout(30):
        while not answered.is_set():
            number += 1
            await engine.submit(DecodeJob(f"a{number}", range(64), flood, adapter="a"), lambda outputs: None)
            await clock.sleep(0.1)
            assert engine.stats().waiting > 0 or answered.is_set(), "who is kept out counts as waiting"
    assert PATIENCE_S <= clock.now_s() - began_s <= PATIENCE_S + 3
    async with asyncio.timeout(30):
        while engine.stats().running + engine.stats().waiting:
            await clock.sleep(1.0)
    await engine.close()
    driver.cancel()


def prefill_request(adapter: str) -> PrefillRequest:
    sampling = engine_pb2.Sampling(max_tokens=4, ignore_eos=True)
    return PrefillRequest(request_id="p", model="sim", token_ids=PROMPT, sampling=sampling, adapter=adapter)


async def test_a_worker_tells_its_adapters_and_refuses_others(hosted, spans):
    async with hosted(adapters=SERVED, sim={"timing": {"adapter_load_ms": 7}}) as worker, session(worker) as client:
        info = (await worker.worker.Describe(DescribeRequest(), timeout=5)).info
        assert (list(info.adapters), info.adapter_load_ms) == (["poet", "sql"], 7)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await worker.prefill.Prefill(prefill_request("cook"), timeout=5)
        refused = from_rpc_error(error.value)
        assert isinstance(refused, FailedPrecondition)
        assert (refused.reason, refused.field) == ("no_adapter", "adapter")
        await client.submit(1, adapter="cook")
        while 1 not in client.rejected:
            await client.read()
        assert (client.rejected[1].code, client.rejected[1].field) == ("FAILED_PRECONDITION", "adapter")
        assert "'cook'" in client.rejected[1].detail
        await worker.prefill.Prefill(prefill_request("sql"), timeout=5)
        await client.submit(2, adapter="poet")
        await client.until_finished(2)
        watch = worker.worker.WatchStats(WatchStatsRequest())
        assert list((await watch.read()).adapters) == ["poet", "sql"]
        watch.cancel()
    told = {span.name: (span.attributes or {}).get("omni.adapter") for span in spans.get_finished_spans()}
    assert told["decode.sequence"] == "poet"
    assert "sql" in told.values()


async def test_a_worker_without_adapters_tells_none(hosted):
    async with hosted(sim={"timing": {"adapter_load_ms": 7}}) as worker:
        info = (await worker.worker.Describe(DescribeRequest(), timeout=5)).info
        assert (list(info.adapters), info.adapter_load_ms) == ([], 0)


@asynccontextmanager
async def simulated(adapters: str = "", **values: object) -> AsyncIterator[tuple[SimEngine, VirtualClock]]:
    clock = VirtualClock()
    engine = SimEngine(SimSettings.model_validate(values), clock=clock, adapters=adapters)
    driver = asyncio.create_task(clock.run())
    await engine.start()
    try:
        yield engine, clock
    finally:
        await engine.close()
        driver.cancel()
        await asyncio.wait({driver})


async def generated(engine: SimEngine, *jobs: DecodeJob) -> dict[str, list[int]]:
    """Tokens of sequences that run side by side, in the order in which they ended."""
    tokens: dict[str, list[int]] = {job.request_id: [] for job in jobs}
    ended: dict[str, list[int]] = {}
    done = asyncio.Event()

    def sink(outputs):
        for output in outputs:
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                ended[output.request_id] = tokens[output.request_id]
        if len(ended) == len(jobs):
            done.set()

    for job in jobs:
        await engine.submit(job, sink)
    async with asyncio.timeout(10):
        await done.wait()
    return ended


def job(name: str, adapter: str = "", tokens: int = 8, prompt: list[int] | None = None) -> DecodeJob:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return DecodeJob(name, prompt or PROMPT, sampling, adapter=adapter)


async def test_simulated_tokens_are_an_adapters_own() -> None:
    async with simulated("ab") as (engine, _), simulated() as (plain, _):
        found = await generated(engine, job("0"), job("1", "a"), job("2", "b"), job("3", "a"))
        assert found["1"] == found["3"]
        assert len({tuple(tokens) for tokens in found.values()}) == 3
        assert await generated(plain, job("0")) == {"0": found["0"]}
        with pytest.raises(FailedPrecondition, match="'c'"):
            await engine.submit(job("4", "c"), print)


async def test_split_and_whole_give_equal_tokens_of_an_adapter() -> None:
    """On the clock of the machine: the pull goes over a socket."""
    engines = [SimEngine(SimSettings(), adapters="ab") for _ in range(2)]
    for engine in engines:
        await engine.start()
    try:
        whole = (await generated(engines[0], job("w", "a")))["w"]
        first = await engines[1].prefill(PrefillJob("p", PROMPT, job("p").sampling, adapter="a"))
        rest = SamplingParams(max_tokens=7, ignore_eos=True)
        both = DecodeJob("p", [*PROMPT, first.first_token_id], rest, 1, first.kv_handle, adapter="a")
        assert [first.first_token_id, *(await generated(engines[0], both))["p"]] == whole
    finally:
        for engine in engines:
            await engine.close()


async def test_simulated_blocks_are_an_adapters_own() -> None:
    async with simulated("ab") as (engine, _):
        mirror = BlockMirror("sim", 16, 1000, 1)
        events = engine.events()
        reading = asyncio.create_task(anext(events))
        await asyncio.sleep(0)
        cached = []
        for name, adapter in enumerate(("", "a", "a", "b", "")):
            done = await engine.prefill(PrefillJob(str(name), PROMPT, job("p").sampling, adapter=adapter))
            cached.append(done.cached_tokens)
        assert cached == [0, 0, 64, 0, 64]
        while True:
            for event in (await reading).events:
                mirror.apply(event)
            reading = asyncio.create_task(anext(events))
            await asyncio.sleep(0)
            if not reading.done():
                break
        reading.cancel()
        held = {block.key for _, blocks in mirror.pages(1000) for block in blocks}
        keys = b"".join(block_keys(PROMPT, 16, root_key("sim", adapter)) for adapter in ("", "a", "b"))
        assert held == {keys[i : i + 16] for i in range(0, len(keys), 16)}


async def test_a_sequence_without_a_slot_is_passed_over() -> None:
    async with simulated("abc", adapter_slots=1) as (engine, _):
        jobs = [job("a1", "a", 40), job("b1", "b", 4), job("base", "", 4), job("a2", "a", 4), job("c1", "c", 4)]
        ended = list(await generated(engine, *jobs))
        assert set(ended[:2]) == {"base", "a2"}, "they need no other slot"
        assert ended[2:] == ["a1", "b1", "c1"]
        assert engine.stats().adapters == ("c",)


async def test_bringing_an_adapter_in_takes_its_time_once() -> None:
    async def took_ms(*adapters: str, slots: int) -> float:
        timing = {"adapter_load_ms": 1000}
        async with simulated("ab", adapter_slots=slots, timing=timing) as (engine, clock):
            for number, adapter in enumerate(adapters):
                await generated(engine, job(str(number), adapter))
            return clock.now_s() * 1e3

    without = await took_ms("", "", "", slots=2)
    assert await took_ms("a", "a", "a", slots=2) == pytest.approx(without + 1000, abs=20)
    assert await took_ms("a", "b", "a", slots=2) == pytest.approx(without + 2000, abs=20)
    assert await took_ms("a", "b", "a", slots=1) == pytest.approx(without + 3000, abs=20)


@given(
    slots=st.integers(1, 3),
    adapters=st.lists(st.sampled_from(["", "a", "b", "c", "d"]), min_size=1, max_size=20),
    blocks=st.integers(20, 40),
)
@settings(max_examples=40, deadline=None)
async def test_every_sequence_gets_its_turn(slots: int, adapters: list[str], blocks: int) -> None:
    """Whatever is passed over, sent back for want of blocks, or evicted."""
    sizes = {"num_blocks": blocks, "max_model_len": 320, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    async with simulated("abcd", adapter_slots=slots, **sizes) as (engine, _):
        jobs = [job(str(i), adapter, 5 + i % 7, PROMPT[i % 3 :]) for i, adapter in enumerate(adapters)]
        ended = await generated(engine, *jobs)
        assert {name: len(tokens) for name, tokens in ended.items()} == {
            one.request_id: one.sampling.max_tokens for one in jobs
        }
        stats = engine.stats()
        assert len(stats.adapters) <= slots
        assert (stats.waiting, stats.kv_usage) == (0, 0)
