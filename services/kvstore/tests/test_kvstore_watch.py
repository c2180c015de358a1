"""Watches that are late, cut off, slow or filtered end knowing the same."""

import asyncio
from typing import Any

import pytest

from omni_kvstore.feed import Interest


async def _until_equal(*views: Any, blocks: int) -> None:
    for view in views:
        await view.until(lambda v: len(v.blocks) == blocks)
    assert all(view.blocks == views[0].blocks for view in views)


async def test_a_watch_resumes_where_it_was_on_any_replica(
    redis_server: Any, start_replica: Any, info: Any, batch: Any, keys: Any
) -> None:
    async with start_replica(redis_url=redis_server.url) as one, start_replica(redis_url=redis_server.url) as two:
        witness, cut = one.watch(blocks=True), one.watch(blocks=True)
        await one.register().beat(info())
        leaving = one.register()
        await leaving.beat(info("w2"))
        await one.publish(batch(1, ("stored", keys(1, 2))))
        await one.publish(batch(1, ("stored", keys(1)), worker_id="w2"))
        await _until_equal(witness, cut, blocks=3)
        cut.cut()
        await one.publish(batch(2, ("removed", keys(2)), ("stored", keys(2, 3), 2)))
        await leaving.leave()
        await one.register().beat(info("w3"))
        await one.publish(batch(1, ("stored", keys(7)), worker_id="w3"))
        await witness.until(lambda v: set(v.workers) == {"w1", "w3"} and len(v.blocks) == 4)
        # The other replica may lag behind what the watch has seen; it resumes once it has caught up.
        fresh = two.watch(blocks=True)
        await fresh.until(lambda v: len(v.blocks) == 4 and v.position.event >= witness.position.event)
        await cut.resume(two)
        await cut.until(lambda v: set(v.workers) == {"w1", "w3"} and len(v.blocks) == 4)
        assert cut.blocks == witness.blocks and cut.snapshots == 1
        assert two.metric("watch_resumes_total") == 1
        await one.publish(batch(3, ("cleared",)))
        await _until_equal(witness, cut, fresh, blocks=1)


@pytest.mark.parametrize("lost", ["trimmed", "other data", "future"])
async def test_a_watch_that_cannot_resume_gets_a_snapshot(
    redis_server: Any, start_replica: Any, info: Any, batch: Any, keys: Any, lost: str
) -> None:
    async with start_replica(redis_url=redis_server.url, max_events=256) as replica:
        witness, cut = replica.watch(blocks=True), replica.watch(blocks=True)
        await replica.register().beat(info())
        await replica.publish(batch(1, ("stored", keys(1))))
        await _until_equal(witness, cut, blocks=1)
        cut.cut()
        if lost == "trimmed":
            for sequence in range(2, 1000):
                await replica.publish(batch(sequence, ("stored", keys(sequence))))
            await witness.until(lambda v: len(v.blocks) == 999)
        elif lost == "other data":
            cut.position.dataset = "another"
        else:
            cut.position.event += 1000
        await cut.resume(replica)
        await _until_equal(witness, cut, blocks=len(witness.blocks))
        assert cut.snapshots == 2


async def test_a_late_and_a_slow_watch_end_like_the_others(
    redis_server: Any, start_replica: Any, info: Any, batch: Any, keys: Any
) -> None:
    async with start_replica(redis_url=redis_server.url, watch_queue=3) as replica:
        witness = replica.watch(blocks=True)
        # Read without a transport, whose buffers would hide that this watcher is slow.
        slow = replica.service.watches.updates(Interest(blocks=True))
        await anext(slow)
        await replica.register().beat(info())
        for sequence in range(1, 40):
            action = "removed" if sequence % 3 == 0 else "stored"
            await replica.publish(batch(sequence, (action, keys(sequence, sequence + 1))))
        await replica.publish(batch(40, ("stored", keys(99))))
        await witness.until(lambda v: ("w1", 1, keys(99)) in v.blocks)
        late = replica.watch(blocks=True)
        await late.until(lambda v: ("w1", 1, keys(99)) in v.blocks)
        assert late.blocks == witness.blocks
        seen: set[bytes] = set()
        async with asyncio.timeout(10):
            async for update in slow:
                seen = set() if update.snapshot else seen
                for change in update.blocks:
                    named = {change.event.keys[i : i + 16] for i in range(0, len(change.event.keys), 16)}
                    seen = seen - named if change.event.action == "removed" else seen | named
                if keys(99) in seen and not update.snapshot:
                    break
        assert seen == {key for _, _, key in witness.blocks}
        await slow.aclose()


async def test_a_watch_keeps_to_its_model(replica: Any, info: Any, batch: Any, keys: Any) -> None:
    mine, every = replica.watch(blocks=True, model="m"), replica.watch(blocks=True)
    await replica.register().beat(info("w1"))
    await replica.register().beat(info("w2", model="other"))
    await replica.publish(batch(1, ("stored", keys(1)), worker_id="w2"))
    await replica.publish(batch(1, ("stored", keys(2)), worker_id="w1"))
    await every.until(lambda v: len(v.blocks) == 2)
    await mine.until(lambda v: len(v.blocks) == 1)
    assert set(mine.workers) == {"w1"} and mine.blocks == {("w1", 1, keys(2))}
    late = replica.watch(blocks=True, model="m")
    await late.until(lambda v: len(v.blocks) == 1)
    assert late.blocks == mine.blocks
