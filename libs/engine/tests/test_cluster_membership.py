"""Registration and block events against a scripted kvstore over real gRPC."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from scripted_kvstore import kvstore

from omni.engine.v1 import engine_pb2
from omni.prefill.v1.prefill_service_pb2 import PrefillRequest
from omni_common.blocks import KEY_BYTES, block_keys, root_key

PROMPT = list(range(100, 170))


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
