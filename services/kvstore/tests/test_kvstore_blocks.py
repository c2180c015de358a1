"""Published blocks as lookups and watchers see them."""

import asyncio
from typing import Any

import grpc
import pytest

from omni_common.rpc_errors import from_rpc_error
from omni_kvstore.feed import Interest


async def test_lookup_finds_the_longest_prefix_per_worker_and_medium(
    replica: Any, info: Any, batch: Any, keys: Any
) -> None:
    for name in ("w1", "w2"):
        await replica.register().beat(info(name))
    await replica.publish(
        batch(1, ("stored", keys(1, 2, 3)), ("stored", keys(1, 2), 2)),
        batch(2, ("removed", keys(3)), ("stored", keys(5))),
    )
    await replica.publish(batch(1, ("stored", keys(1, 2, 3, 4)), worker_id="w2"))
    await replica.publish(batch(3, ("stored", keys(3), 2)))
    # w1 has blocks 1 and 2 in the device's memory and 3 in the host's: tiers add up.
    assert await replica.lookup(keys(1, 2, 3, 4, 5)) == {("w1", 1): 2, ("w1", 2): 3, ("w2", 1): 4}
    assert await replica.lookup(keys(1)) == {("w1", 1): 1, ("w2", 1): 1}
    assert await replica.lookup(keys(9, 1)) == await replica.lookup(b"") == {}


@pytest.mark.parametrize(
    ("fields", "is_found"),
    [
        pytest.param({"model": "m", "block_size": 16}, True, id="equal"),
        pytest.param({"model": "other"}, False, id="other model"),
        pytest.param({"block_size": 128}, False, id="other block size"),
    ],
)
async def test_lookup_keeps_to_the_model(
    replica: Any, info: Any, batch: Any, keys: Any, fields: dict[str, Any], is_found: bool
) -> None:
    await replica.register().beat(info())
    await replica.publish(batch(1, ("stored", keys(1))))
    assert bool(await replica.lookup(keys(1), **fields)) is is_found


async def test_cleared_forgets_everything(replica: Any, info: Any, batch: Any, keys: Any) -> None:
    view = replica.watch(blocks=True)
    await replica.register().beat(info())
    await replica.publish(batch(1, ("stored", keys(1, 2)), ("cleared",), ("stored", keys(2))))
    assert await replica.lookup(keys(1, 2)) == {}
    await replica.publish(batch(2, ("stored", keys(1))))
    assert await replica.lookup(keys(1, 2)) == {("w1", 1): 2}
    await view.until(lambda v: v.blocks == {("w1", 1, keys(1)), ("w1", 1, keys(2))})


async def test_gap_asks_for_a_snapshot_which_replaces(replica: Any, info: Any, batch: Any, keys: Any) -> None:
    lease, view = replica.register(), replica.watch(blocks=True)
    await lease.beat(info())
    answer = await replica.publish(batch(1, ("stored", keys(1))))
    assert (answer.accepted_sequence, answer.wants_snapshot) == (1, False)
    assert not (await lease.beat()).wants_snapshot
    answer = await replica.publish(batch(3, ("stored", keys(3))), batch(4, ("stored", keys(4))))
    assert (answer.accepted_sequence, answer.wants_snapshot) == (1, True)
    assert (await lease.beat()).wants_snapshot
    answer = await replica.publish(batch(5, ("stored", keys(7, 8)), snapshot=True), batch(6, ("stored", keys(9))))
    assert (answer.accepted_sequence, answer.wants_snapshot) == (6, False)
    assert not (await lease.beat()).wants_snapshot
    assert await replica.lookup(keys(1)) == {}
    await view.until(lambda v: {entry[2] for entry in v.blocks} == {keys(7), keys(8), keys(9)})


async def test_repeated_batch_is_accepted_once(replica: Any, info: Any, batch: Any, keys: Any) -> None:
    await replica.register().beat(info())
    await replica.publish(batch(1, ("stored", keys(1))), batch(2, ("removed", keys(1))))
    assert (await replica.publish(batch(1, ("stored", keys(1))))).accepted_sequence == 2
    assert await replica.lookup(keys(1)) == {}


async def test_batch_larger_than_one_part_arrives_whole(replica: Any, info: Any, batch: Any, keys: Any) -> None:
    many = keys(*range(1, 7001))
    await replica.register().beat(info())
    answer = await replica.publish(batch(4, ("stored", many), snapshot=True))
    assert answer.accepted_sequence == 4
    assert await replica.lookup(many) == {("w1", 1): 7000}
    late = replica.watch(blocks=True)
    await late.until(lambda v: len(v.blocks) == 7000)
    assert late.snapshots == 1


async def test_ended_epochs_entries_are_removed_from_redis(
    redis_server: Any, start_replica: Any, info: Any, batch: Any, keys: Any
) -> None:
    from redis.asyncio import Redis

    async with start_replica(redis_url=redis_server.url, lease_s=0.5, block_ttl_s=600) as replica:
        lease = replica.register()
        await lease.beat(info())
        await replica.publish(batch(1, ("stored", keys(*range(1, 5001)))))
        async with Redis.from_url(redis_server.url) as client:
            assert await client.exists(b"omni:{default}:span:1:" + keys(1)) == 1
            assert 0 < await client.ttl(b"omni:{default}:span:1:" + keys(1)) <= 600
            await lease.leave()
            async with asyncio.timeout(15):
                # Ends when the sweep has: it polls Redis, whose state is the result looked for.
                while await client.hlen("omni:{default}:trash") or [k async for k in client.scan_iter("*:span:*")]:
                    pass
            assert not [k async for k in client.scan_iter("*:held:*")]
            assert await client.get("omni:{default}:entries") == b"0"


@pytest.mark.parametrize(
    ("epoch", "worker_id", "reason"),
    [
        pytest.param(999, "w1", "stale_epoch", id="earlier epoch"),
        pytest.param(1001, "w1", "not_registered", id="epoch not registered"),
        pytest.param(1000, "nobody", "not_registered", id="unknown worker"),
    ],
)
async def test_blocks_of_another_epoch_are_refused(
    replica: Any, info: Any, batch: Any, keys: Any, epoch: int, worker_id: str, reason: str
) -> None:
    await replica.register().beat(info())
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await replica.publish(batch(1, ("stored", keys(1)), epoch=epoch, worker_id=worker_id))
    assert from_rpc_error(refused.value).reason == reason


@pytest.mark.parametrize(
    ("change", "field"),
    [
        pytest.param({"block_keys": b"short"}, "events.block_keys", id="half a key"),
        pytest.param({"medium": 0}, "events.medium", id="no medium"),
        pytest.param({"span": b""}, "events.span", id="no span"),
        pytest.param({"positions": [0, 1, 2]}, "events.positions", id="more positions than keys"),
        pytest.param({"action": 0}, "events.action", id="no action"),
    ],
)
async def test_unusable_events_are_refused(
    replica: Any, info: Any, batch: Any, keys: Any, change: dict[str, Any], field: str
) -> None:
    await replica.register().beat(info())
    request = batch(1, ("stored", keys(1, 2)))
    event = request.events[0]
    for name, value in change.items():
        event.ClearField(name)
        if isinstance(value, list):
            event.positions.extend(value)
        else:
            setattr(event, name, value)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await replica.publish(request)
    error = from_rpc_error(refused.value)
    assert (error.code, error.field) == ("INVALID_ARGUMENT", field)
    assert await replica.lookup(keys(1, 2)) == {}


async def test_unusable_requests_are_refused(redis_server: Any, start_replica: Any, batch: Any, keys: Any) -> None:
    async with start_replica(redis_url=redis_server.url, max_lookup_blocks=2) as replica:
        calls = (
            (replica.lookup(b"short"), "block_keys"),
            (replica.lookup(keys(1, 2, 3)), "block_keys"),
            (replica.lookup(keys(1), model=""), "model"),
            (replica.lookup(keys(1), block_size=0), "block_size"),
            (replica.publish(batch(0, ("stored", keys(1)))), "sequence"),
        )
        for call, field in calls:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            error = from_rpc_error(refused.value)
            assert (error.code, error.field) == ("INVALID_ARGUMENT", field)


async def test_full_watch_queue_gets_a_fresh_snapshot(
    redis_server: Any, start_replica: Any, info: Any, batch: Any, keys: Any
) -> None:
    async with start_replica(redis_url=redis_server.url, watch_queue=2) as replica:
        # Read without a transport, whose buffers would hide that this watcher is slow.
        slow, witness = replica.service.watches.updates(Interest(blocks=True)), replica.watch(blocks=True)
        assert (await anext(slow)).snapshot and (await anext(slow)).complete
        await replica.register().beat(info())
        for sequence in range(1, 6):
            await replica.publish(batch(sequence, ("stored", keys(sequence))))
            await witness.until(lambda v, sequence=sequence: len(v.blocks) == sequence)
        fresh, blocks = await anext(slow), await anext(slow)
        assert fresh.snapshot and [change.worker.worker_id for change in fresh.workers] == ["w1"]
        assert len(blocks.blocks[0].event.keys) == len(keys(1, 2, 3, 4, 5))
        await slow.aclose()
