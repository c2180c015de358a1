"""What a lookup answers over tiers, pools and spans: Redis, a replica's memory and a plain model agree."""

import itertools
from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from omni.engine.v1 import engine_pb2
from omni_common.blocks import KEY_BYTES, SPAN_BLOCKS
from omni_kvstore.blocks import Action, Batch, BlockChange, BlockEvent, Match, pack_positions
from omni_kvstore.client import connect
from omni_kvstore.membership import Worker, WorkerChange
from omni_kvstore.memory import BlockMemory
from omni_kvstore.metrics import Metrics
from omni_kvstore.store import Limits, RedisStore

LENGTH = 2 * SPAN_BLOCKS + 300
PROMPT = [(1_000_000 + i).to_bytes(KEY_BYTES, "big") for i in range(LENGTH)]
MEMBERS = {"w1": 0, "w2": 0, "w3": 0, "pool-a": 2, "pool-b": 4}
"""Name -> medium of the pool, 0 of a worker."""
_edges = st.sampled_from([0, 1, 5, 31, 32, 33, 1023, 1024, 1025, 1500, 2047, 2048, LENGTH])
_stretch = st.tuples(st.sampled_from(sorted(MEMBERS)), st.integers(1, 4), _edges, _edges)
_names = (f"lookup-{number}" for number in itertools.count())


def _events(medium: int, first: int, last: int) -> list[BlockEvent]:
    """Blocks `first` to before `last`, an event per span."""
    events = []
    for start in range(first - first % SPAN_BLOCKS, last, SPAN_BLOCKS):
        low, high = max(first, start), min(last, start + SPAN_BLOCKS)
        keys = b"".join(PROMPT[low:high])
        events.append(BlockEvent(Action.STORED, medium, keys, PROMPT[start], pack_positions([low])))
    return events


def _expected(stretches: Sequence[Any], length: int) -> set[Match]:
    """Tier by tier and block by block, from the definition."""
    held = {(name, medium, i) for name, medium, low, high in stretches for i in range(low, high)}
    tiers: list[tuple[int, str]] = []
    for medium in range(1, 5):
        tiers += [(medium, ""), *((medium, pool) for pool, of in sorted(MEMBERS.items()) if of == medium)]

    def has(worker: str, tier: tuple[int, str], i: int) -> bool:
        medium, pool = tier
        return any((pool, m, i) in held for m in range(1, 5)) if pool else (worker, medium, i) in held

    def rows(worker: str) -> set[tuple[int, str, int]]:
        reached, found = 0, set()
        for number, tier in enumerate(tiers):
            depth = 0
            while depth < length and any(has(worker, of, depth) for of in tiers[: number + 1]):
                depth += 1
            if depth > reached:
                found.add((*tier, depth))
                reached = depth
        return found

    by_worker = {worker: rows(worker) for worker in ("", *(name for name, of in MEMBERS.items() if not of))}
    anyone = by_worker[""]
    return {Match(w, *row) for w, found in by_worker.items() if not w or found != anyone for row in found}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stretches=st.lists(_stretch, max_size=10), length=_edges)
async def test_lookups_agree(redis_server: Any, stretches: Sequence[Any], length: int) -> None:
    client = connect(redis_server.url, is_cluster=False, timeout_s=5.0, connections=4)
    limits = Limits(60_000, 600_000, 4096, 100_000, 1_000_000)
    store, memory = RedisStore(client, next(_names), limits, Metrics(CollectorRegistry())), BlockMemory(100_000)
    try:
        for name, pool_medium in MEMBERS.items():
            worker = Worker(name, 1, "m", 16, b"", pool_medium=pool_medium)
            await store.register(worker)
            memory.members_changed([WorkerChange(worker)])
        for name in MEMBERS:
            own = [e for owner, medium, low, high in stretches if owner == name for e in _events(medium, low, high)]
            await store.publish(Batch(name, 1, 1, True, tuple(own)))
            memory.blocks_changed(BlockChange(name, 1, event) for event in own)
        prompt = b"".join(PROMPT[:length])
        expected = _expected(stretches, length)
        assert set(await store.lookup("m", 16, prompt)) == expected
        assert set(memory.lookup(prompt)) == expected
    finally:
        await client.close()


def _pool(name: str, medium: int = 4) -> dict[str, Any]:
    cost = engine_pb2.PoolCost(medium=medium, latency_ms=2.0, ms_per_block=0.5)  # type: ignore[arg-type]
    return {"worker_id": name, "role": engine_pb2.ROLE_STORE, "pool": cost}


async def test_a_pool_serves_every_worker_and_ends_with_its_lease(
    replica: Any, info: Any, batch: Any, keys: Any
) -> None:
    for name in ("w1", "w2"):
        await replica.register().beat(info(name))
    pool = replica.register()
    await pool.beat(info(**_pool("store")))
    await replica.publish(batch(1, ("stored", keys(1))))
    await replica.publish(batch(1, ("stored", keys(1, 2, 3), 4), worker_id="store"))
    # w1 holds the first block and loads two; anybody else loads three.
    assert await replica.lookup(keys(1, 2, 3, 4)) == {("w1", 1): 1, ("w1", "store"): 3, ("", "store"): 3}
    await pool.leave()
    assert await replica.lookup(keys(1, 2, 3, 4)) == {("w1", 1): 1}


async def test_operators_see_members_and_blocks(replica: Any, info: Any, batch: Any, keys: Any) -> None:
    await replica.register().beat(info("w1"), draining=True)
    await replica.register().beat(info("w2", model="other"))
    await replica.publish(batch(1, ("stored", keys(1, 2)), ("stored", keys(2), 2)))
    states = await replica.workers()
    assert set(states) == {"w1", "w2"} and set(await replica.workers(model="other")) == {"w2"}
    w1, w2 = states["w1"], states["w2"]
    assert (w1.draining, w1.sequence, w1.wants_snapshot, w1.num_blocks) == (True, 1, False, 2)
    assert (w2.draining, w2.sequence, w2.wants_snapshot, w2.num_blocks) == (False, 0, True, 0)
    assert 0 < w1.lease_left_s <= 30
    assert await replica.held("w1") == {(1, keys(1)), (1, keys(2)), (2, keys(2))}
