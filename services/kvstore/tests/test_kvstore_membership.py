"""Leases, epochs and their end, as workers and watchers see them."""

from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from omni.engine.v1 import engine_pb2
from omni_common.rpc_errors import from_rpc_error
from omni_kvstore.wire import MAX_INFO_BYTES

SHORT_LEASE_S = 0.6


async def test_worker_joins_changes_and_leaves(replica: Any, info: Any) -> None:
    view, lease = replica.watch(), replica.register()
    answer = await lease.beat(info())
    assert (answer.epoch, answer.lease_s, answer.wants_snapshot) == (1000, 30.0, True)
    await view.until(lambda v: "w1" in v.workers)
    assert view.workers["w1"] == info()
    await lease.beat(draining=True)
    await view.until(lambda v: "w1" in v.draining)
    await lease.beat(info(layout_version=7))
    await view.until(lambda v: v.workers["w1"].layout_version == 7 and not v.draining)
    await lease.leave()
    await view.until(lambda v: not v.workers)


async def test_a_role_changes_within_the_epoch_and_the_blocks_stay(
    redis_server: Any, start_replica: Any, info: Any, batch: Any, keys: Any
) -> None:
    async with start_replica(redis_url=redis_server.url) as one, start_replica(redis_url=redis_server.url) as two:
        views, lease = [one.watch(blocks=True), two.watch(blocks=True)], one.register()
        await lease.beat(info(role=engine_pb2.ROLE_DECODE))
        await one.publish(batch(1, ("stored", keys(1, 2))))
        for view in views:
            await view.until(lambda v: len(v.blocks) == 2)
        assert (await lease.beat(info(role=engine_pb2.ROLE_PREFILL))).wants_snapshot is False
        for view in views:
            await view.until(lambda v: v.workers["w1"].role == engine_pb2.ROLE_PREFILL)
            assert len(view.blocks) == 2
        assert await two.lookup(keys(1, 2)) == {("w1", 1): 2}


async def test_lease_ends_without_heartbeats_and_takes_the_blocks_along(
    redis_server: Any, start_replica: Any, info: Any, batch: Any, keys: Any
) -> None:
    async with start_replica(redis_url=redis_server.url, lease_s=SHORT_LEASE_S) as replica:
        view = replica.watch(blocks=True)
        async with replica.register().beating(info(), SHORT_LEASE_S / 6):
            await replica.publish(batch(1, ("stored", keys(1, 2))))
            await view.until(lambda v: len(v.blocks) == 2)
        await view.until(lambda v: not v.workers)
        assert view.blocks == set()
        assert await replica.lookup(keys(1, 2)) == {}
        assert replica.metric("leases_ended_total") == 1


async def test_silent_worker_may_come_back_with_its_epoch(
    redis_server: Any, start_replica: Any, info: Any, batch: Any, keys: Any
) -> None:
    async with start_replica(redis_url=redis_server.url, lease_s=SHORT_LEASE_S) as replica:
        view = replica.watch()
        await replica.register().beat(info())
        await replica.publish(batch(1, ("stored", keys(1))))
        await view.until(lambda v: bool(v.workers))
        await view.until(lambda v: not v.workers)
        async with replica.register().beating(info(), SHORT_LEASE_S / 6):
            assert (await replica.publish(batch(2, ("stored", keys(2))))).wants_snapshot
            await replica.publish(batch(3, ("stored", keys(1, 2)), snapshot=True))
            assert await replica.lookup(keys(1, 2)) == {("w1", 1): 2}


async def test_higher_epoch_replaces_the_old_at_once(replica: Any, info: Any, batch: Any, keys: Any) -> None:
    view, old, new = replica.watch(blocks=True), replica.register(), replica.register()
    await old.beat(info(epoch=1000))
    await replica.publish(batch(1, ("stored", keys(1, 2))))
    await view.until(lambda v: len(v.blocks) == 2)
    assert (await new.beat(info(epoch=2000))).wants_snapshot
    assert await replica.lookup(keys(1, 2)) == {}
    await view.until(lambda v: v.workers["w1"].epoch == 2000)
    assert view.blocks == set()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await old.beat()
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await replica.publish(batch(2, ("stored", keys(3)), epoch=1000))
    assert late.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_lower_epoch_is_refused_with_a_reason(replica: Any, info: Any) -> None:
    await replica.register().beat(info(epoch=2000))
    call = replica.stub.Register(iter([_first(info(epoch=1000))]), timeout=15)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.read()
    assert _reason(refused.value) == "stale_epoch"


async def test_old_epochs_leave_does_not_end_the_new_one(replica: Any, info: Any) -> None:
    old, new, view = replica.register(), replica.register(), replica.watch()
    await old.beat(info(epoch=1000))
    await new.beat(info(epoch=2000))
    await old.leave()
    await new.beat(info(epoch=2000, layout_version=1))
    await view.until(lambda v: v.workers.get("w1") == info(epoch=2000, layout_version=1))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        pytest.param({"worker_id": ""}, "info.worker_id", id="no name"),
        pytest.param({"worker_id": "x" * 300}, "info.worker_id", id="long name"),
        pytest.param({"epoch": 0}, "info.epoch", id="no epoch"),
        pytest.param({"address": ""}, "info.address", id="no address"),
        pytest.param({"address": "fd00::1:7100"}, "info.address", id="IPv6 without brackets"),
    ],
)
async def test_unusable_info_is_refused(replica: Any, info: Any, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await replica.stub.Register(iter([_first(info(**fields))]), timeout=15).read()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field.split(".")[1] in str(refused.value.details())


async def test_info_that_would_fill_redis_and_every_watch_is_refused(replica: Any, info: Any) -> None:
    large = info(labels={"note": "x" * MAX_INFO_BYTES})
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await replica.stub.Register(iter([_first(large)]), timeout=15).read()
    assert from_rpc_error(refused.value).field == "info"
    assert await replica.workers() == {}


async def test_first_message_must_carry_info(replica: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await replica.register().beat()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_number_of_workers_is_bounded(redis_server: Any, start_replica: Any, info: Any) -> None:
    async with start_replica(redis_url=redis_server.url, max_workers=1) as replica:
        view, first = replica.watch(), replica.register()
        await first.beat(info("w1"))
        await view.until(lambda v: "w1" in v.workers)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await replica.register().beat(info("w2"))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await first.beat()).epoch == 1000


async def test_two_replicas_agree(redis_server: Any, start_replica: Any, info: Any, batch: Any, keys: Any) -> None:
    values = {"redis_url": redis_server.url, "lease_s": SHORT_LEASE_S}
    async with start_replica(**values) as one, start_replica(**values) as two:
        first, second = one.watch(blocks=True), two.watch(blocks=True)
        async with one.register().beating(info("a"), SHORT_LEASE_S / 6):
            async with two.register().beating(info("b"), SHORT_LEASE_S / 6):
                await two.publish(batch(1, ("stored", keys(1, 2)), worker_id="a"))
                for view in (first, second):
                    await view.until(lambda v: set(v.workers) == {"a", "b"} and len(v.blocks) == 2)
                assert await one.lookup(keys(1, 2, 3)) == await two.lookup(keys(1, 2, 3)) == {("a", 1): 2}
            for view in (first, second):
                await view.until(lambda v: set(v.workers) == {"a"})


async def test_clusters_on_one_redis_are_apart(redis_server: Any, start_replica: Any, info: Any) -> None:
    async with (
        start_replica(redis_url=redis_server.url, cluster="blue") as blue,
        start_replica(redis_url=redis_server.url, cluster="green") as green,
    ):
        await blue.register().beat(info("b"))
        await green.register().beat(info("g"))
        for replica, name in ((blue, "b"), (green, "g")):
            await replica.watch().until(lambda v, name=name: set(v.workers) == {name})


async def test_health_turns_serving_and_watches_end_on_drain(replica: Any) -> None:
    health = health_pb2_grpc.HealthStub(replica.channel)  # type: ignore[no-untyped-call]
    watching = health.Watch(health_pb2.HealthCheckRequest(service="omni.kvstore.v1.KvStoreService"), timeout=15)
    while (await watching.read()).status != health_pb2.HealthCheckResponse.SERVING:
        pass
    view = replica.watch()
    await view.until(lambda v: v.snapshots == 1)
    await replica.service.drain()
    await view.end()


def _first(worker: Any) -> Any:
    from omni.kvstore.v1 import kvstore_service_pb2 as pb

    return pb.RegisterRequest(info=worker)


def _reason(error: grpc.aio.AioRpcError) -> str:
    from omni_common.rpc_errors import from_rpc_error

    return from_rpc_error(error).reason
