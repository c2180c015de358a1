"""Registration and block events against a scripted kvstore over real gRPC."""

import asyncio
from contextlib import asynccontextmanager

from omni.engine.v1 import engine_pb2
from omni.kvstore.v1 import kvstore_service_pb2 as wire
from omni.kvstore.v1.kvstore_service_pb2_grpc import KvStoreServiceServicer, add_KvStoreServiceServicer_to_server
from omni.prefill.v1.prefill_service_pb2 import PrefillRequest
from omni_common.blocks import KEY_BYTES, block_keys, root_key
from omni_common.rpc import Server, Servicer

PROMPT = list(range(100, 170))


class KvStore(KvStoreServiceServicer):
    """Remembers what it was told; `told` is set at every message."""

    def __init__(self, lease_s=0.3):
        self.lease_s = lease_s
        self.registers = []
        self.batches = []
        self.told = asyncio.Event()
        self.wants_snapshot = False

    async def Register(self, requests, context):
        async for request in requests:
            self.registers.append(request)
            self.told.set()
            yield wire.RegisterResponse(epoch=1, lease_s=self.lease_s, wants_snapshot=self.wants_snapshot)
            self.wants_snapshot = False

    async def PublishBlocks(self, requests, context):
        async for request in requests:
            self.batches.append(request)
            self.told.set()
        return wire.PublishBlocksResponse()

    async def until(self, condition):
        async with asyncio.timeout(10):
            while not condition():
                self.told.clear()
                await self.told.wait()

    def held(self):
        """Keys of the worker, as a store applies the batches."""
        keys = set()
        for batch in self.batches:
            if batch.snapshot:
                keys.clear()
            for event in batch.events:
                named = {event.block_keys[i : i + KEY_BYTES] for i in range(0, len(event.block_keys), KEY_BYTES)}
                stored = event.action == wire.BLOCK_ACTION_STORED
                keys = keys | named if stored else keys - named
        return keys


@asynccontextmanager
async def kvstore(address="127.0.0.1:0", **values):
    servicer = KvStore(**values)
    service = Servicer(servicer, add_KvStoreServiceServicer_to_server, "omni.kvstore.v1.KvStoreService")
    server = Server([service])
    servicer.port = await server.start(address)
    try:
        yield servicer
    finally:
        await server.stop(0)


def request(name, **fields):
    sampling = engine_pb2.Sampling(max_tokens=4, ignore_eos=True)
    return PrefillRequest(request_id=name, model="sim", token_ids=PROMPT, sampling=sampling, **fields)


def keys_of(salt=""):
    joined = block_keys(PROMPT, 16, root_key("sim", salt=salt))
    return {joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES)}


async def test_registers_renews_tells_draining_and_leaves(hosted):
    async with kvstore() as store:
        async with hosted(kvstore=f"127.0.0.1:{store.port}") as worker:
            await store.until(lambda: len(store.registers) >= 3)
            info = store.registers[0].info
            assert info.worker_id == worker.host.identity.worker_id
            assert not store.registers[1].HasField("info")
            worker.host.admission.set_draining(True)
            await store.until(lambda: store.registers[-1].draining)
        await store.until(lambda: store.registers[-1].leave)


async def test_blocks_are_published_under_our_keys(hosted):
    settings = {"events_interval_s": 0.01, "sim": {"num_blocks": 24, "max_model_len": 384, "lease_s": 0.05}}
    async with kvstore() as store, hosted(kvstore=f"127.0.0.1:{store.port}", **settings) as worker:
        await store.until(lambda: store.batches and store.batches[0].snapshot)
        await worker.prefill.Prefill(request("a"), timeout=5)
        await store.until(lambda: store.held() == keys_of())
        await worker.prefill.Prefill(request("b", cache_salt="s"), timeout=5)
        await store.until(lambda: store.held() == keys_of() | keys_of("s"))
        await worker.idle()
        for name in "cdefg":
            await worker.prefill.Prefill(request(name, cache_salt=name), timeout=5)
            await worker.idle()
        await store.until(lambda: keys_of("g") <= store.held() and len(store.held()) <= 24)
        assert keys_of() - store.held()
        assert [b.sequence for b in store.batches] == list(range(1, len(store.batches) + 1))
        assert {b.epoch for b in store.batches} == {worker.host.identity.epoch}


async def test_a_snapshot_is_sent_on_demand(hosted):
    async with kvstore() as store, hosted(kvstore=f"127.0.0.1:{store.port}", events_interval_s=0.01) as worker:
        await worker.prefill.Prefill(request("a"), timeout=5)
        await store.until(lambda: store.held() == keys_of())
        store.batches.clear()
        store.wants_snapshot = True
        await store.until(lambda: any(b.snapshot for b in store.batches))
        assert store.held() == keys_of()


async def test_an_absent_kvstore_never_stops_serving(hosted, caplog):
    async with kvstore() as first:
        address = f"127.0.0.1:{first.port}"
    async with hosted(kvstore=address, events_interval_s=0.01) as worker:
        await worker.prefill.Prefill(request("a"), timeout=5)
        for _ in range(2):
            async with kvstore(address) as store:
                await store.until(lambda store=store: store.registers and store.held() == keys_of())
                assert store.registers[0].info.worker_id == worker.host.identity.worker_id
            await worker.prefill.Prefill(request(f"b{_}"), timeout=5)
    outages = [r for r in caplog.records if "kvstore not reached" in r.message]
    assert 1 <= len(outages) <= 3
