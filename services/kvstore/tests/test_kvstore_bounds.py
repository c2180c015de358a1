"""What is forgotten first, and what becomes of keys of another schema."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from omni_common.errors import FailedPrecondition, InvalidRequest
from omni_kvstore.migrate import migrate
from omni_kvstore.settings import Settings


@pytest.mark.parametrize(
    ("bounds", "left"),
    [
        pytest.param({"max_blocks_per_worker": 4}, 4, id="of a worker"),
        pytest.param({"max_entries": 5}, 3, id="of all: two are another's"),
    ],
)
async def test_the_deepest_blocks_go_first(
    redis_server: Any, start_replica: Any, info: Any, batch: Any, keys: Any, bounds: dict[str, int], left: int
) -> None:
    async with start_replica(redis_url=redis_server.url, **bounds) as replica:
        view = replica.watch(blocks=True)
        for name in ("other", "w1"):
            await replica.register().beat(info(name))
        await replica.publish(batch(1, ("stored", keys(1, 2)), worker_id="other"))
        await replica.publish(batch(1, ("stored", keys(4, 5, 6, 7))))
        answer = await replica.publish(batch(2, ("stored", keys(1, 2, 3), 2)))
        assert not answer.wants_snapshot
        kept = {key for _, key in await replica.held("w1")}
        assert kept == {keys(number) for number in range(1, left + 1)}
        assert await replica.held("other") == {(1, keys(1)), (1, keys(2))}
        await view.until(lambda v: {entry[2] for entry in v.blocks if entry[0] == "w1"} == kept)
        assert replica.metric("evicted_blocks_total") == 7 - left


async def test_restarted_redis_asks_every_worker_for_a_snapshot(
    tmp_path: Path, start_replica: Any, info: Any, batch: Any, keys: Any, make_redis: Any
) -> None:
    server = make_redis("--appendonly", "yes", "--appendfsync", "always")
    server.start()
    async with start_replica(redis_url=server.url) as replica:
        view, lease = replica.watch(blocks=True), replica.register()
        await lease.beat(info())
        await replica.publish(batch(1, ("stored", keys(1, 2)), snapshot=True))
        await view.until(lambda v: len(v.blocks) == 2)
        before = view.position.dataset
        assert not (await lease.beat()).wants_snapshot
        server.kill()
        server.start()
        await view.until(lambda v: v.snapshots == 2 and not v.degraded and v.position.dataset != before)
        # What Redis kept serves on until the worker has said all it holds.
        assert await replica.lookup(keys(1, 2)) == {("w1", 1): 2}
        assert (await lease.beat()).wants_snapshot
        await replica.publish(batch(2, ("stored", keys(1)), snapshot=True))
        assert await replica.lookup(keys(1, 2)) == {("w1", 1): 1}
        assert not (await lease.beat()).wants_snapshot


@pytest.mark.parametrize("found", ["1", "3"])
async def test_another_schema_is_refused(redis_server: Any, found: str) -> None:
    async with Redis.from_url(redis_server.url) as client:
        if found == "1":
            await client.set("omni:{default}:dataset", "old")
        else:
            await client.set("omni:{default}:schema", found)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "omni_kvstore"),
        env={"OMNI_KVSTORE_PORT": "0", "OMNI_KVSTORE_REDIS_URL": redis_server.url},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(30):
            _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 1
    assert f"schema {found}" in errors.decode() and "omni-kvstore migrate" in errors.decode()


@pytest.mark.parametrize("url", ["http://redis:6379", "redis://redis:many"])
def test_a_redis_url_that_cannot_be_read_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="OMNI_KVSTORE_REDIS_URL"):
        Settings.load({"OMNI_KVSTORE_REDIS_URL": url})


async def test_migration_removes_the_old_keys_and_only_where_nobody_uses_them(redis_server: Any) -> None:
    async with Redis.from_url(redis_server.url) as client:
        await client.mset({"omni:{default}:dataset": "old", "omni:{default}:block:x": "1", "omni:{other}:run": "5"})
        seconds, _ = await client.time()
        await client.set("omni:{default}:reaped", seconds * 1000)
        with pytest.raises(FailedPrecondition) as refused:
            await migrate(client, "default", lease_s=60.0)
        assert refused.value.reason == "schema_in_use"
        await client.set("omni:{default}:reaped", (seconds - 100) * 1000)
        assert "removed 3 keys" in await migrate(client, "default", lease_s=60.0)
        assert await client.keys("*") == [b"omni:{other}:run"]
        await client.set("omni:{default}:schema", "9")
        with pytest.raises(FailedPrecondition):
            await migrate(client, "default", lease_s=60.0)
