"""Published blocks as lookups and watchers see them."""

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omni_common.rpc_errors import from_rpc_error


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
    expected = {("w1", 1): 2, ("w1", 2): 2, ("w2", 1): 4}
    assert await replica.lookup(keys(1, 2, 3, 4, 5)) == expected
    assert await replica.lookup(keys(1)) == {("w1", 1): 1, ("w1", 2): 1, ("w2", 1): 1}
    assert await replica.lookup(keys(9, 1)) == await replica.lookup(b"") == {}


@pytest.mark.parametrize(
    ("fields", "is_found"),
    [
        pytest.param({}, True, id="any"),
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
    assert await replica.lookup(keys(2)) == {("w1", 1): 1}
    await view.until(lambda v: v.blocks == {("w1", 1, keys(2))})


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
            assert await client.exists(b"omni:{default}:block:" + keys(1)) == 1
            assert 0 < await client.ttl(b"omni:{default}:block:" + keys(1)) <= 600
            await lease.leave()
            async with asyncio.timeout(15):
                # Ends when the sweep has: it polls Redis, whose state is the result looked for.
                while await client.scard("omni:{default}:trash") or [k async for k in client.scan_iter("*:block:*")]:
                    pass
            assert not [k async for k in client.scan_iter("*:held:*")]


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


async def test_unusable_requests_are_refused(
    redis_server: Any, start_replica: Any, info: Any, batch: Any, keys: Any
) -> None:
    async with start_replica(redis_url=redis_server.url, max_lookup_blocks=2) as replica:
        calls = (
            replica.lookup(b"short"),
            replica.lookup(keys(1, 2, 3)),
            replica.publish(batch(1, ("stored", b"short"))),
            replica.publish(batch(1, ("stored", keys(1), 0))),
            replica.publish(batch(0, ("stored", keys(1)))),
        )
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_full_watch_queue_gets_a_fresh_snapshot(
    redis_server: Any, start_replica: Any, info: Any, batch: Any, keys: Any
) -> None:
    async with start_replica(redis_url=redis_server.url, watch_queue=2) as replica:
        # Read without a transport, whose buffers would hide that this watcher is slow.
        slow, witness = replica.service.replica.updates(True), replica.watch(blocks=True)
        assert (await anext(slow)).snapshot
        await replica.register().beat(info())
        for sequence in range(1, 6):
            await replica.publish(batch(sequence, ("stored", keys(sequence))))
            await witness.until(lambda v, sequence=sequence: len(v.blocks) == sequence)
        fresh, blocks = await anext(slow), await anext(slow)
        assert fresh.snapshot and [change.worker.worker_id for change in fresh.workers] == ["w1"]
        assert len(blocks.blocks[0].event.keys) == len(keys(1, 2, 3, 4, 5))
        await slow.aclose()


_worker = st.sampled_from(["a", "b", "c"])
_event = st.tuples(
    _worker,
    st.sampled_from(["stored", "removed", "cleared"]),
    st.lists(st.integers(1, 6), min_size=1, max_size=6),
    st.sampled_from([1, 2]),
)


def _prefixes(held: set[tuple[str, int, int]], wanted: Iterable[int]) -> dict[tuple[str, int], int]:
    matches: dict[tuple[str, int], int] = {}
    for worker, medium in {(w, m) for w, m, _ in held}:
        length = 0
        for number in wanted:
            if (worker, medium, number) not in held:
                break
            length += 1
        if length:
            matches[worker, medium] = length
    return matches


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=st.lists(_event, max_size=12), wanted=st.lists(st.integers(1, 6), max_size=6))
async def test_lookup_and_watch_agree_with_a_model(
    replica: Any, info: Any, batch: Any, keys: Any, events: list[Any], wanted: list[int]
) -> None:
    held: set[tuple[str, int, int]] = set()
    sequences = dict.fromkeys("abc", 1)
    for name in "abc":
        await replica.register().beat(info(name))
        await replica.publish(batch(1, worker_id=name, snapshot=True))
    for worker, action, numbers, medium in events:
        sequences[worker] += 1
        await replica.publish(batch(sequences[worker], (action, keys(*numbers), medium), worker_id=worker))
        named = {(worker, medium, number) for number in numbers}
        if action == "cleared":
            held = {entry for entry in held if entry[0] != worker}
        else:
            held = held | named if action == "stored" else held - named
    assert await replica.lookup(keys(*wanted)) == _prefixes(held, wanted)
    view = replica.watch(blocks=True)
    await view.until(lambda v: v.blocks == {(w, m, keys(n)) for w, m, n in held})
