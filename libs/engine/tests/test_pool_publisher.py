"""A shared pool as a member of the cluster, against a scripted kvstore."""

import asyncio
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from scripted_kvstore import kvstore

from omni.engine.v1 import engine_pb2
from omni.kv.v1 import kv_pb2
from omni_common.blocks import KEY_BYTES, SPAN_BLOCKS, block_keys, root_key
from omni_common.rpc import channel
from omni_engine.hosting.pool import LoadCost, PoolInfo, PoolPublisher
from omni_engine.ports import Medium

KEYS = block_keys(range(SPAN_BLOCKS + 10), 1, root_key("m"))
INFO = PoolInfo("pool", "m", 1, 5000, Medium.REMOTE, LoadCost(1.5, 0.25), epoch=3, address="store:1")


def names(first, count):
    return {KEYS[i * KEY_BYTES : (i + 1) * KEY_BYTES] for i in range(first, first + count)}


@asynccontextmanager
async def running(address, info=INFO):
    async with channel(address) as connected:
        pool = PoolPublisher(connected, info, interval_s=0.001)
        task = asyncio.create_task(pool.run())
        try:
            yield pool
        finally:
            task.cancel()
            await asyncio.wait({task})


async def test_a_pool_registers_with_its_cost_and_leaves():
    async with kvstore() as store:
        async with running(f"127.0.0.1:{store.port}"):
            await store.until(lambda: store.registers)
            info = store.registers[0].info
            assert (info.worker_id, info.role, info.epoch) == ("pool", engine_pb2.ROLE_STORE, 3)
            assert (info.model, info.block_size, info.num_blocks) == ("m", 1, 5000)
            assert (info.pool.medium, info.pool.latency_ms, info.pool.ms_per_block) == (kv_pb2.MEDIUM_REMOTE, 1.5, 0.25)
            await store.until(lambda: store.batches)
        await store.until(lambda: store.registers[-1].leave)


async def test_a_pool_publishes_its_blocks():
    async with kvstore() as store, running(f"127.0.0.1:{store.port}") as pool:
        await store.until(lambda: store.batches)
        pool.store(KEYS[: 4 * KEY_BYTES])
        pool.store(KEYS, first=SPAN_BLOCKS + 2)
        await store.until(lambda: store.held() == names(0, 4) | names(SPAN_BLOCKS + 2, 8))
        for (medium, key), (position, span) in store.picture().items():
            assert medium == kv_pb2.MEDIUM_REMOTE
            assert key in names(position, 1)
            assert span in names(position - position % SPAN_BLOCKS, 1)
        pool.remove(KEYS[: 2 * KEY_BYTES] + b"unknown key, 16b")
        await store.until(lambda: store.held() == names(2, 2) | names(SPAN_BLOCKS + 2, 8))
        pool.clear()
        pool.store(KEYS[:KEY_BYTES])
        await store.until(lambda: store.held() == names(0, 1))


async def test_a_store_that_lost_everything_is_told_again():
    async with kvstore() as first:
        address = f"127.0.0.1:{first.port}"
        await first.until(lambda: True)
    async with running(address) as pool:
        pool.store(KEYS[: 4 * KEY_BYTES])
        async with kvstore(address) as store:
            await store.until(lambda: store.held() == names(0, 4))
            store.batches.clear()
            store.wants_snapshot = True
            await store.until(lambda: store.batches and store.held() == names(0, 4))
            assert store.batches[0].snapshot
        pool.store(KEYS[: 6 * KEY_BYTES])
        async with kvstore(address) as store:
            await store.until(lambda: store.held() == names(0, 6))


async def test_a_pool_publishes_no_more_than_its_capacity():
    info = PoolInfo("pool", "m", 1, 3, Medium.HOST, LoadCost(1, 1), epoch=1, address="store:1")
    async with kvstore() as store, running(f"127.0.0.1:{store.port}", info) as pool:
        pool.store(KEYS[: 5 * KEY_BYTES])
        await store.until(lambda: store.held() == names(0, 3))
        assert (len(pool), pool.refused) == (3, 2)


async def test_a_pool_is_not_device_memory():
    async with channel("127.0.0.1:1") as connected:
        with pytest.raises(ValueError, match="medium"):
            PoolPublisher(connected, PoolInfo("p", "m", 1, 3, Medium.HBM, LoadCost(1, 1), epoch=1, address="a:1"))
