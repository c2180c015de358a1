"""Whatever happens to events on their way, the index ends with what the engines hold.

Workers store, drop and clear blocks of a few prompts that share beginnings, and restart; their batches are lost,
doubled and swapped, and come late from an epoch that is over. Afterwards each publishes once more, as a relay does when
it has something new or its stream broke, and answers a gap with a snapshot. Then the index must equal the
engines: in Redis, in what the event stream makes of it, and in a replica's memory alone.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from omni_common.blocks import KEY_BYTES, block_keys, root_key
from omni_common.errors import FailedPrecondition
from omni_kvstore.blocks import Action, Batch, BlockChange, BlockEvent, Match, pack_positions
from omni_kvstore.client import connect
from omni_kvstore.events import BlocksChanged
from omni_kvstore.feed import Feed
from omni_kvstore.membership import Directory, Leases, Worker, WorkerChange, WorkerLeft
from omni_kvstore.memory import BlockMemory
from omni_kvstore.metrics import Metrics
from omni_kvstore.replica import Replica
from omni_kvstore.store import Limits, Published, RedisStore

MODEL, BLOCK_SIZE, DEPTH = "m", 4, 5
WORKERS = ("a", "b", "c")
HBM, HOST = 1, 2


def _prompts() -> list[list[bytes]]:
    """Keys of prompts that share their first, second and no block."""
    tokens = [[1, 1, 1, 1, 1], [1, 1, 2, 2, 2], [1, 3, 3, 3, 3], [4, 4, 4, 4, 4]]
    joined = [
        block_keys([token for token in row for _ in range(BLOCK_SIZE)], BLOCK_SIZE, root_key(MODEL)) for row in tokens
    ]
    return [[keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)] for keys in joined]


PROMPTS = _prompts()


class Index(Protocol):
    """What the workers of the test speak to."""

    async def register(self, worker: Worker) -> None: ...
    async def publish(self, batch: Batch) -> Published: ...


@dataclass
class Engine:
    """A worker: what it truly holds, and the relay's side of publishing it."""

    name: str
    epoch: int = 1
    held: set[tuple[int, bytes]] = field(default_factory=set)
    pending: list[BlockEvent] = field(default_factory=list)
    sequence: int = 0
    sent: list[Batch] = field(default_factory=list)

    def store(self, prompt: int, first: int, last: int, medium: int) -> None:
        keys = PROMPTS[prompt][first : last + 1]
        if not keys:
            return
        self.held |= {(medium, key) for key in keys}
        event = BlockEvent(Action.STORED, medium, b"".join(keys), PROMPTS[prompt][0], pack_positions([first]))
        self.pending.append(event)

    def remove(self, prompt: int, index: int, medium: int) -> None:
        key = PROMPTS[prompt][index]
        self.held.discard((medium, key))
        self.pending.append(BlockEvent(Action.REMOVED, medium, key, PROMPTS[prompt][0]))

    def clear(self) -> None:
        self.held.clear()
        self.pending.append(BlockEvent(Action.CLEARED, 0, b""))

    def restart(self) -> None:
        self.epoch += 1
        self.sequence = 0
        self.held.clear()
        self.pending.clear()

    def batch(self) -> Batch:
        self.sequence += 1
        events, self.pending = tuple(self.pending), []
        return Batch(self.name, self.epoch, self.sequence, False, events)

    def snapshot(self) -> Batch:
        self.sequence += 1
        self.pending = []
        events = []
        for prompt, medium in itertools.product(PROMPTS, (HBM, HOST)):
            found = [(i, key) for i, key in enumerate(prompt) if (medium, key) in self.held]
            if found:
                positions = pack_positions([i for i, _ in found])
                keys = b"".join(key for _, key in found)
                events.append(BlockEvent(Action.STORED, medium, keys, prompt[0], positions))
        return Batch(self.name, self.epoch, self.sequence, True, tuple(events))

    def worker(self) -> Worker:
        return Worker(self.name, self.epoch, MODEL, BLOCK_SIZE, b"")

    def depths(self, prompt: Sequence[bytes]) -> dict[tuple[str, int], int]:
        """The rows a lookup should have for this worker."""
        hbm = _leading(prompt, {key for medium, key in self.held if medium == HBM})
        both = _leading(prompt, {key for _, key in self.held})
        rows = {(self.name, HBM): hbm, (self.name, HOST): both if both > hbm else 0}
        return {row: depth for row, depth in rows.items() if depth}


def _leading(prompt: Iterable[bytes], held: set[bytes]) -> int:
    return sum(1 for _ in itertools.takewhile(held.__contains__, prompt))


_operation = st.one_of(
    st.tuples(
        st.just("store"), st.sampled_from(WORKERS), st.integers(0, 3), st.integers(0, DEPTH - 1),
        st.integers(0, DEPTH - 1), st.sampled_from([HBM, HOST]),
    ),
    st.tuples(
        st.just("remove"), st.sampled_from(WORKERS), st.integers(0, 3), st.integers(0, DEPTH - 1),
        st.sampled_from([HBM, HOST]),
    ),
    st.tuples(
        st.sampled_from(["clear", "restart", "publish", "publish", "lose", "duplicate", "swap", "late"]),
        st.sampled_from(WORKERS),
    ),
)  # fmt: skip
_history = st.lists(_operation, max_size=25)


async def _play(index: Index, history: Sequence[Any]) -> dict[str, Engine]:
    engines = {name: Engine(name) for name in WORKERS}
    for engine in engines.values():
        await index.register(engine.worker())
        await _deliver(index, engine, engine.snapshot())
    for kind, name, *arguments in history:
        await _happen(index, engines[name], kind, arguments)
    for engine in engines.values():
        await _deliver(index, engine, engine.batch())
    return engines


async def _happen(index: Index, engine: Engine, kind: str, arguments: Sequence[int]) -> None:
    match kind:
        case "store":
            engine.store(*arguments)
        case "remove":
            engine.remove(*arguments)
        case "clear":
            engine.clear()
        case "restart":
            engine.restart()
            await index.register(engine.worker())
            await _deliver(index, engine, engine.snapshot())
        case "publish":
            await _deliver(index, engine, engine.batch())
        case "lose":
            engine.batch()
        case "duplicate" if engine.sent:
            await _deliver(index, engine, engine.sent[-1])
        case "swap":
            first, second = engine.batch(), engine.batch()
            await _deliver(index, engine, second)
            await _deliver(index, engine, first)
        case "late" if engine.epoch > 1:
            keys = PROMPTS[0][0]
            event = BlockEvent(Action.STORED, HBM, keys, keys, pack_positions([0]))
            with pytest.raises(FailedPrecondition):
                await index.publish(Batch(engine.name, engine.epoch - 1, 99, True, (event,)))


async def _deliver(index: Index, engine: Engine, batch: Batch) -> None:
    """As a relay: a gap is answered with a snapshot."""
    engine.sent.append(batch)
    if batch.epoch != engine.epoch:
        with pytest.raises(FailedPrecondition):
            await index.publish(batch)
    elif (await index.publish(batch)).gap:
        snapshot = engine.snapshot()
        engine.sent.append(snapshot)
        assert not (await index.publish(snapshot)).gap


def _check(engines: dict[str, Engine], held: dict[str, set[tuple[int, bytes]]]) -> None:
    assert held == {name: engine.held for name, engine in engines.items()}


def _check_lookup(engines: dict[str, Engine], prompt: Sequence[bytes], matches: Sequence[Match]) -> None:
    expected = {row: depth for engine in engines.values() for row, depth in engine.depths(prompt).items()}
    assert {(m.worker_id, m.medium): m.num_blocks for m in matches} == expected


def _held_by(changes: Iterable[BlockChange]) -> set[tuple[int, bytes]]:
    return {
        (change.event.medium, change.event.keys[i : i + KEY_BYTES])
        for change in changes
        for i in range(0, len(change.event.keys), KEY_BYTES)
    }


class InMemory:
    """A replica that has never reached Redis."""

    def __init__(self) -> None:
        unreached: Any = None
        self.replica = Replica(
            unreached, Feed(64), Leases(60.0), Metrics(CollectorRegistry()),
            max_workers=8, memory_blocks=1000, reconcile_s=1.0, wait_s=1.0,
        )  # fmt: skip

    async def register(self, worker: Worker) -> None:
        await self.replica.renew(worker)

    async def publish(self, batch: Batch) -> Published:
        return await self.replica.publish(batch)


@settings(max_examples=2000, deadline=None)
@given(history=_history)
async def test_in_memory(history: Sequence[Any]) -> None:
    index = InMemory()
    engines = await _play(index, history)
    held = {name: _held_by([change async for change, _ in index.replica.blocks_of(name)]) for name in WORKERS}
    _check(engines, held)
    for prompt in PROMPTS:
        matches, degraded = await index.replica.lookup(MODEL, BLOCK_SIZE, b"".join(prompt))
        assert degraded
        _check_lookup(engines, prompt, matches)


class Follower:
    """A replica's memory, fed by the event stream alone."""

    def __init__(self) -> None:
        self.memory, self.directory, self.position = BlockMemory(1000), Directory(), 0

    async def catch_up(self, store: RedisStore) -> None:
        last = (await store.load()).position
        async for page in store.events_between(self.position, last):
            for number, event in page:
                assert number == self.position + 1
                self.position = number
                self._apply(event)
        assert self.position == last

    def _apply(self, event: Any) -> None:
        members: list[WorkerChange] = []
        match event:
            case BlocksChanged():
                self.memory.blocks_changed(BlockChange(event.worker_id, event.epoch, e) for e in event.events)
            case WorkerLeft():
                members = self.directory.drop(event.worker_id, event.epoch)
            case Worker():
                members = self.directory.put(event)
        self.memory.members_changed(members)


class OnRedis:
    def __init__(self, store: RedisStore) -> None:
        self.store = store

    async def register(self, worker: Worker) -> None:
        assert (await self.store.register(worker)).accepted

    async def publish(self, batch: Batch) -> Published:
        return await self.store.publish(batch)


@pytest.fixture
async def open_store(any_redis: Any) -> AsyncIterator[Callable[[str], RedisStore]]:
    """Stores of clusters of their own on one Redis, of each kind there is."""
    client = connect(any_redis.url, is_cluster=any_redis.is_cluster, timeout_s=5.0, connections=8)
    metrics = Metrics(CollectorRegistry())
    limits = Limits(60_000, 600_000, 4096, 10_000, 100_000)
    yield lambda cluster: RedisStore(client, cluster, limits, metrics)
    await client.close()


_cluster_names = (f"case-{number}" for number in itertools.count())


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=_history)
async def test_on_redis(open_store: Callable[[str], RedisStore], history: Sequence[Any]) -> None:
    store = open_store(next(_cluster_names))
    await store.load()
    engines = await _play(OnRedis(store), history)
    _check(engines, {name: _held_by([change async for change in store.blocks_of(name)]) for name in WORKERS})
    for prompt in PROMPTS:
        _check_lookup(engines, prompt, await store.lookup(MODEL, BLOCK_SIZE, b"".join(prompt)))
    follower = Follower()
    await follower.catch_up(store)
    _check(engines, {name: _held_by(follower.memory.held(engines[name].worker())) for name in WORKERS})
    await _sweep(store)
    assert (await store.load()).entries == sum(len({key for _, key in e.held}) for e in engines.values())


async def _sweep(store: RedisStore) -> None:
    async with asyncio.timeout(10):
        while await store.sweep(1000):
            pass
