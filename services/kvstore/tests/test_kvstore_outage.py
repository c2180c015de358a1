"""Redis away, back, and back empty; the embedded server; settings."""

import asyncio
import contextlib
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from omni_common.errors import InvalidRequest, Unavailable
from omni_kvstore import embedded
from omni_kvstore.feed import Feed, Position
from omni_kvstore.membership import Leases, Renewal, Worker
from omni_kvstore.memory import BlockMemory
from omni_kvstore.metrics import Metrics
from omni_kvstore.replica import Replica
from omni_kvstore.settings import Settings
from omni_kvstore.store import Limits, RedisStore


async def test_redis_killed_and_restarted_empty(
    redis_server: Any, start_replica: Any, info: Any, batch: Any, keys: Any
) -> None:
    values = {"redis_url": redis_server.url, "lease_s": 3.0}
    async with start_replica(**values) as one, start_replica(**values) as two:
        view, other = one.watch(blocks=True), two.watch()
        lease = one.register()
        await lease.beat(info())
        await one.publish(batch(1, ("stored", keys(1))))
        async with two.register().beating(info("w2"), 0.2):
            await view.until(lambda v: len(v.workers) == 2 and len(v.blocks) == 1)
            redis_server.kill()
            for watch in (view, other):
                await watch.until(lambda v: v.degraded)
            assert one.metric("degraded") == 1
            assert (await lease.beat()).epoch == 1000
            assert set(view.workers) == {"w1", "w2"}
            # Blocks are served from memory, and those published meanwhile are added to it.
            assert await one.lookup(keys(1, 2)) == {("w1", 1): 1}
            assert not (await one.publish(batch(2, ("stored", keys(2))))).wants_snapshot
            assert await one.lookup(keys(1, 2)) == {("w1", 1): 2}
            await view.until(lambda v: len(v.blocks) == 2)
            assert (await one.publish(batch(9, ("stored", keys(9))))).wants_snapshot
            assert await one.held("w1") == {(1, keys(1)), (1, keys(2))}
            assert (await one.workers())["w1"].sequence == 2
            late = two.watch(blocks=True)
            await late.until(lambda v: v.degraded and set(v.workers) == {"w1", "w2"} and len(v.blocks) == 1)
            redis_server.start()
            for watch in (view, other, late):
                await watch.until(lambda v: not v.degraded and set(v.workers) == {"w1", "w2"})
            assert (await lease.beat()).wants_snapshot
            assert (await one.publish(batch(3, ("stored", keys(3))))).wants_snapshot
            await one.publish(batch(4, ("stored", keys(1, 2, 3)), snapshot=True))
            for watch in (view, late):
                await watch.until(lambda v: len(v.blocks) == 3)
            assert await two.lookup(keys(1, 2, 3)) == {("w1", 1): 3}


async def test_membership_changes_in_an_outage_reach_redis(redis_server: Any, start_replica: Any, info: Any) -> None:
    values = {"redis_url": redis_server.url, "lease_s": 1.0}
    async with start_replica(**values) as one, start_replica(**values) as two:
        view, other, leaving = one.watch(), two.watch(), one.register()
        await leaving.beat(info("gone"))
        await one.register().beat(info("silent"))
        await view.until(lambda v: len(v.workers) == 2)
        redis_server.kill()
        await view.until(lambda v: v.degraded)
        await leaving.leave()
        async with one.register().beating(info("new"), 0.1):
            await view.until(lambda v: set(v.workers) == {"new"})
            redis_server.start()
            for watch in (view, other):
                await watch.until(lambda v: not v.degraded and set(v.workers) == {"new"})


async def test_starts_without_redis_and_serves_once_it_answers(
    stopped_redis: Any, start_replica: Any, info: Any
) -> None:
    async with start_replica(redis_url=stopped_redis.url, wait=False) as replica:
        health = health_pb2_grpc.HealthStub(replica.channel)  # type: ignore[no-untyped-call]
        watching = health.Watch(health_pb2.HealthCheckRequest(), timeout=20)
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        view = replica.watch()
        await replica.register().beat(info())
        await view.until(lambda v: v.degraded and set(v.workers) == {"w1"})
        assert await replica.lookup(b"") == {}
        stopped_redis.start()
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        await view.until(lambda v: not v.degraded and set(v.workers) == {"w1"})


class _HangsUp:
    """A client as uvloop has it where Redis ends the connection while it opens, as with TLS on one side only."""

    async def evalsha(self, *arguments: Any) -> Any:
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")


async def test_a_connection_that_ends_while_it_opens_is_an_outage() -> None:
    store = RedisStore(_HangsUp(), "c", Limits(1000, 1000, 10, 10, 10), Metrics(CollectorRegistry()))  # type: ignore[arg-type]
    with pytest.raises(Unavailable, match="the handler is closed"):
        await store.load()


class _Hangs:
    """A store whose Redis takes the first heartbeat and then answers none until `gone`."""

    def __init__(self) -> None:
        self.asked, self.gone = asyncio.Event(), asyncio.Event()
        self._is_first = True

    async def register(self, worker: Worker) -> Renewal:
        if self._is_first:
            self._is_first = False
            return Renewal(accepted=True, epoch=worker.epoch, wants_snapshot=False)
        self.asked.set()
        await self.gone.wait()
        raise Unavailable("Redis cannot be reached")


async def test_who_beats_stays_however_long_redis_takes_to_fail() -> None:
    store, metrics, now_s = _Hangs(), Metrics(CollectorRegistry()), 0.0
    bounds = {"max_workers": 10, "memory_blocks": 10, "reconcile_s": 1.0, "wait_s": 1.0}
    replica = Replica(store, Feed(10), Leases(5.0), metrics, clock=lambda: now_s, **bounds)  # type: ignore[arg-type]
    worker = Worker("w1", 1000, "m", 16, b"")
    replica.view.replace([worker], BlockMemory(10), Position("d", 1))
    await replica.renew(worker)
    now_s = 1.7
    beat = asyncio.create_task(replica.renew(worker))
    await store.asked.wait()
    replica.view.is_degraded = True  # the follower's own call has failed first
    now_s = 5.5
    keeping = asyncio.create_task(replica.keep(60.0))
    await asyncio.sleep(0)
    assert replica.knows("w1")
    store.gone.set()
    await beat
    keeping.cancel()


async def test_emptied_redis_is_noticed_without_a_broken_connection(
    redis_server: Any, start_replica: Any, info: Any
) -> None:
    from redis.asyncio import Redis

    async with start_replica(redis_url=redis_server.url, reconcile_s=0.1) as replica:
        view = replica.watch()
        await replica.register().beat(info())
        await view.until(lambda v: v.snapshots == 1 and len(v.workers) == 1)
        async with Redis.from_url(redis_server.url) as client:
            await client.flushall()
        await view.until(lambda v: v.snapshots == 2 and len(v.workers) == 1)


async def test_module_runs_with_an_embedded_redis_and_keeps_its_data(tmp_path: Path) -> None:
    for _ in range(2):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "omni_kvstore"),
            env={"OMNI_KVSTORE_PORT": "0", "OMNI_KVSTORE_EMBEDDED_REDIS_DIR": str(tmp_path / "redis")},
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stderr is not None
        try:
            async with asyncio.timeout(30):
                while b'"serving"' not in (line := await process.stderr.readline()):
                    assert line, "ended before serving"
                assert b'"port": ' in line
                process.send_signal(signal.SIGTERM)
                await process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        assert process.returncode == 0
    assert (tmp_path / "redis" / "appendonly.aof").stat().st_size > 0


async def test_an_embedded_redis_that_hangs_in_its_start_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs_once = tmp_path / "redis-server"
    hangs_once.write_text(
        f'#!/bin/sh\n[ -e "$0.hung" ] || {{ touch "$0.hung"; exec sleep 60; }}\nexec {embedded.executable()} "$@"\n'
    )
    hangs_once.chmod(0o755)
    redis = embedded.EmbeddedRedis(tmp_path / "data")
    await redis.start()
    monkeypatch.setattr(embedded, "executable", lambda: str(hangs_once))
    monkeypatch.setattr(embedded, "_START_TIMEOUT_S", 1.0)
    supervised = asyncio.create_task(redis.supervise())
    try:
        async with asyncio.timeout(30), Redis.from_url(redis.url) as client:
            await client.set("before", 1)
            await client.shutdown(save=True)
            while True:
                with contextlib.suppress(RedisConnectionError):
                    assert await client.get("before") == b"1"
                    break
                await asyncio.sleep(0.05)
    finally:
        supervised.cancel()
        await redis.stop()
    assert hangs_once.with_suffix(".hung").exists()


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param({"OMNI_KVSTORE_CLUSTER": "a b"}, id="cluster name"),
        pytest.param({"OMNI_KVSTORE_LEASE_S": "0"}, id="no lease"),
        pytest.param({"OMNI_KVSTORE_REDIS": "redis://x"}, id="misspelt"),
    ],
)
def test_unusable_settings_are_refused(environ: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest):
        Settings.load(environ)
