"""The relay from an engine's batches to the kvstore, through losses and defects; and what it tells operators."""

import asyncio
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from scripted_kvstore import kvstore

from omni.engine.v1 import engine_pb2
from omni.engine.v1.worker_service_pb2 import ListBlocksRequest
from omni.kv.v1 import kv_pb2
from omni.prefill.v1.prefill_service_pb2 import PrefillRequest
from omni_common.blocks import KEY_BYTES, block_keys, root_key
from omni_common.rpc import channel
from omni_common.rpc_errors import from_rpc_error
from omni_engine.hosting import events as events_module
from omni_engine.hosting.events import BlockRelay
from omni_engine.hosting.mirror import BlockMirror
from omni_engine.hosting.publisher import BlockPublisher
from omni_engine.ports import BlocksCleared, BlocksRemoved, BlocksStored, EventBatch

TOKENS = list(range(20))
KEYS = block_keys(TOKENS, 1, root_key("m"))


def key(*positions):
    return {KEYS[p * KEY_BYTES : (p + 1) * KEY_BYTES] for p in positions}


def stored(first, count):
    names = [bytes([i]) for i in range(first, first + count)]
    return BlocksStored(names, bytes([first - 1]) if first else None, TOKENS[first : first + count], 1)


class Stream:
    """An engine of which only the events matter; an exception in the queue is raised in its place."""

    def __init__(self):
        self.queue = asyncio.Queue()

    def put(self, sequence, *events, **fields):
        self.queue.put_nowait(EventBatch(sequence, events, **fields))

    async def events(self):
        while True:
            item = await self.queue.get()
            if isinstance(item, Exception):
                raise item
            yield item


@asynccontextmanager
async def relayed():
    """A stream of events, the relay of them, and the store that is told."""
    registered = asyncio.Event()
    registered.set()
    async with kvstore() as store, channel(f"127.0.0.1:{store.port}") as connected:
        stream, mirror = Stream(), BlockMirror("m", 1, 1000)
        relay = BlockRelay(stream, mirror, BlockPublisher(connected, "w", 7, mirror.pages, 0.001))
        running = asyncio.create_task(relay.run(registered.wait))
        try:
            yield stream, relay, store
        finally:
            running.cancel()
            await asyncio.wait({running})


async def test_what_the_engine_holds_is_what_the_store_is_told():
    async with relayed() as (stream, relay, store):
        stream.put(0, stored(0, 5), occurred_unix_ms=1000)
        stream.put(1, stored(5, 3), BlocksRemoved([b"\x07"]), skipped={"group": 2})
        await store.until(lambda: store.held() == key(*range(7)))
        stream.put(2, BlocksCleared(), stored(0, 2))
        await store.until(lambda: store.held() == key(0, 1))
        report = relay.report()
        assert dict(report.events) == {"stored": 3, "removed": 1, "cleared": 1}
        assert dict(report.skipped) == {"group": 2}
        assert (report.gaps, report.resets, report.mirrored) == (0, 0, 2)


@pytest.mark.parametrize(("after", "gaps"), [(2, 1), (5, 1), (0, 1), (1, 0)])
async def test_after_a_gap_nothing_old_is_named(after, gaps, caplog):
    async with relayed() as (stream, relay, store):
        stream.put(0, stored(0, 5))
        await store.until(lambda: store.held() == key(*range(5)))
        stream.put(after, BlocksStored([b"x"], None, [99], 1))
        new = {block_keys([99], 1, root_key("m"))}
        await store.until(lambda: store.held() == (new if gaps else new | key(*range(5))))
        assert (relay.report().gaps, relay.report().resets) == (gaps, gaps)
        assert ("block events lost" in caplog.text) == bool(gaps)


async def test_replayed_batches_fill_a_gap():
    async with relayed() as (stream, relay, store):
        stream.put(0, stored(0, 1))
        for sequence in (1, 2):
            stream.put(sequence, stored(sequence, 1), is_replayed=True)
        stream.put(3, stored(3, 1))
        await store.until(lambda: store.held() == key(0, 1, 2, 3))
        report = relay.report()
        assert (report.gaps, report.replayed, report.resets) == (1, 2, 0)


async def test_a_partial_replay_is_one_gap():
    async with relayed() as (stream, relay, store):
        stream.put(0, stored(0, 1))
        await store.until(lambda: store.held() == key(0))
        stream.put(2, BlocksStored([b"x"], None, [99], 1), is_replayed=True)
        stream.put(3, BlocksStored([b"y"], b"x", [98], 1))
        await store.until(lambda: len(store.held()) == 2)
        report = relay.report()
        assert (report.gaps, report.replayed, report.resets) == (1, 1, 1)
        assert not store.held() & key(0)


async def test_an_event_that_cannot_be_applied_costs_the_mirror_and_not_the_relay():
    async with relayed() as (stream, relay, store):
        stream.put(0, stored(0, 5))
        await store.until(lambda: store.held() == key(*range(5)))
        stream.put(1, BlocksStored([b"x"], None, [-1], 1), stored(0, 2))
        await store.until(lambda: store.held() == key(0, 1))
        assert relay.report().resets == 1


async def test_a_stream_that_breaks_off_is_taken_up_again(monkeypatch):
    monkeypatch.setattr(events_module, "_RESTART_S", 0.001)
    async with relayed() as (stream, relay, store):
        stream.put(0, stored(0, 5))
        await store.until(lambda: store.held() == key(*range(5)))
        stream.queue.put_nowait(RuntimeError("defect"))
        stream.put(1, stored(0, 2))
        await store.until(lambda: store.held() == key(0, 1))
        assert relay.report().resets == 1


PROMPT = list(range(100, 170))
PROMPT_KEYS = block_keys(PROMPT, 16, root_key("sim"))


def request(name):
    sampling = engine_pb2.Sampling(max_tokens=4, ignore_eos=True)
    return PrefillRequest(request_id=name, model="sim", token_ids=PROMPT, sampling=sampling)


async def pages(worker):
    return [page async for page in worker.worker.ListBlocks(ListBlocksRequest(), timeout=5)]


async def test_a_worker_lists_the_blocks_it_mirrors(hosted):
    async with kvstore() as store, hosted(kvstore=f"127.0.0.1:{store.port}", events_interval_s=0.01) as worker:
        (empty,) = await pages(worker)
        assert (empty.epoch, empty.block_keys) == (worker.host.identity.epoch, b"")
        await worker.prefill.Prefill(request("a"), timeout=5)
        await store.until(lambda: len(store.held()) == 4)
        (page,) = await pages(worker)
        assert (page.epoch, page.medium) == (worker.host.identity.epoch, kv_pb2.MEDIUM_HBM)
        assert page.block_keys == PROMPT_KEYS
        assert {k for _, k in store.picture()} == store.held()


async def test_a_worker_without_a_kvstore_mirrors_nothing(hosted):
    async with hosted() as worker:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await pages(worker)
        assert from_rpc_error(refused.value).reason == "no_mirror"


async def test_lost_batches_of_an_engine_cost_blocks_and_never_name_stale_ones(hosted):
    async with kvstore() as store, hosted(kvstore=f"127.0.0.1:{store.port}", events_interval_s=0.01) as worker:
        await worker.prefill.Prefill(request("a"), timeout=5)
        await store.until(lambda: len(store.held()) == 4)
        worker.engine.faults.drop_next_event_batches = 1
        for name in ("b", "c"):
            await worker.prefill.Prefill(
                PrefillRequest(
                    request_id=name,
                    model="sim",
                    token_ids=[ord(name)] * 32,
                    sampling=engine_pb2.Sampling(max_tokens=4, ignore_eos=True),
                ),
                timeout=5,
            )
        last = block_keys([ord("c")] * 32, 16, root_key("sim"))
        await store.until(lambda: store.held() == {last[:16], last[16:]})


async def test_operators_see_events_and_their_losses(hosted, until):
    async with kvstore() as store, hosted(kvstore=f"127.0.0.1:{store.port}", events_interval_s=0.01) as worker:
        await worker.prefill.Prefill(request("a"), timeout=5)
        await store.until(lambda: len(store.held()) == 4)
        read = worker.registry.get_sample_value
        assert read("omni_worker_block_events_total", {"event": "stored"}) == 4
        assert read("omni_worker_mirrored_blocks") == 4
        await until(lambda: read("omni_worker_block_snapshots_total") == 1)
        for name in ("block_event_gaps_total", "block_event_replays_total", "block_mirror_resets_total"):
            assert read(f"omni_worker_{name}") == 0
        assert read("omni_worker_pending_blocks") == 0
