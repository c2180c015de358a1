"""What the kvstore is told: pending changes as values, and the stream of them against a scripted kvstore."""

import asyncio
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from scripted_kvstore import Picture, kvstore

from omni.kvstore.v1 import kvstore_service_pb2 as wire
from omni_common.blocks import KEY_BYTES, SPAN_BLOCKS, block_keys, root_key
from omni_common.rpc import channel
from omni_engine.hosting import publisher as publisher_module
from omni_engine.hosting.mirror import Block, BlockMirror, Change
from omni_engine.hosting.pending import Pending
from omni_engine.hosting.publisher import BlockPublisher
from omni_engine.hosting.wire import MEDIA
from omni_engine.ports import BlocksRemoved, BlocksStored, Medium


def prompt_blocks(seed, count):
    keys = block_keys([seed, *range(count)], 1, root_key("m"))[: count * KEY_BYTES]
    names = [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]
    return [Block(key, i, names[i - i % SPAN_BLOCKS]) for i, key in enumerate(names)]


# Two spans of one prompt, and another prompt.
BLOCKS = [*prompt_blocks(1, SPAN_BLOCKS + 4)[-8:], *prompt_blocks(2, 5)]
changes = st.tuples(st.sampled_from([Medium.HBM, Medium.HOST]), st.sampled_from(BLOCKS), st.booleans())
scripts = st.lists(st.one_of(changes, st.just("clear"), st.just("take")), max_size=60)


def told(picture, pending, max_blocks=3):
    """Sends what is pending to the picture; returns the number of events in each message."""
    sizes = []
    for events in pending.take(max_blocks):
        assert sum(len(e.block_keys) for e in events) <= max_blocks * KEY_BYTES
        sizes.append(len(events))
        picture.apply(wire.PublishBlocksRequest(events=events))
    return sizes


@given(scripts)
def test_what_is_told_ends_where_the_changes_end(script):
    truth, picture, pending = {}, Picture(), Pending()
    for step in script:
        match step:
            case "clear":
                truth.clear()
                pending.add_clearing(1)
            case "take":
                told(picture, pending)
                assert picture.blocks == truth
            case (medium, block, is_held):
                pending.add([Change(medium, block, is_held)], 1)
                if is_held:
                    truth[MEDIA[medium], block.key] = (block.position, block.span)
                else:
                    truth.pop((MEDIA[medium], block.key), None)
    told(picture, pending)
    assert picture.blocks == truth
    assert len(pending) == 0


def test_single_removals_of_a_span_leave_as_one_event():
    pending, blocks = Pending(), prompt_blocks(3, 40)
    for block in reversed(blocks):
        pending.add([Change(Medium.HBM, block, False)], 1)
    (events,) = pending.take(1000)
    assert [(e.action, e.block_keys) for e in events] == [
        (wire.BLOCK_ACTION_REMOVED, b"".join(block.key for block in blocks))
    ]


def test_removed_then_stored_is_stored():
    pending, picture, block = Pending(), Picture(), BLOCKS[0]
    pending.add([Change(Medium.HBM, block, False), Change(Medium.HBM, block, True)], 1)
    told(picture, pending)
    assert picture.blocks == {(MEDIA[Medium.HBM], block.key): (block.position, block.span)}


def test_the_first_event_dates_the_batch():
    pending = Pending()
    for occurred_unix_ms in (50, 60):
        pending.add([Change(Medium.HBM, BLOCKS[0], True)], occurred_unix_ms)
    assert pending.occurred_unix_ms == 50
    told(Picture(), pending)
    assert pending.occurred_unix_ms == 0


def test_positions_are_one_where_blocks_follow_each_other():
    pending, blocks = Pending(), prompt_blocks(3, 10)
    pending.add([Change(Medium.HBM, block, True) for block in blocks[2:6]], 1)
    pending.add([Change(Medium.HOST, block, True) for block in (blocks[9], blocks[1], blocks[2])], 1)
    (events,) = pending.take(100)
    assert [list(e.positions) for e in events] == [[2], [1, 2, 9]]


SIZE = 1


def stored(first, count):
    names = [f"{i}".encode() for i in range(first, first + count)]
    parent = f"{first - 1}".encode() if first else None
    return BlocksStored(names, parent, range(first, first + count), SIZE)


def removed(*names):
    return BlocksRemoved([f"{n}".encode() for n in names])


@asynccontextmanager
async def publishing(store, mirror, interval_s=0.001):
    registered = asyncio.Event()
    registered.set()
    async with channel(f"127.0.0.1:{store.port}") as connected:
        publisher = BlockPublisher(connected, "w", 7, mirror.pages, interval_s)
        running = asyncio.create_task(publisher.run(registered.wait))
        try:
            yield publisher
        finally:
            running.cancel()
            await asyncio.wait({running})


async def some_time(store):
    """Many times what a publisher with this interval would need to send something."""
    async with channel(f"127.0.0.1:{store.port}") as connected:
        for _ in range(20):
            await health_pb2_grpc.HealthStub(connected).Check(health_pb2.HealthCheckRequest(), timeout=5)


def expected(mirror):
    return {
        (MEDIA[medium], block.key): (block.position, block.span)
        for medium, blocks in mirror.pages(1000)
        for block in blocks
    }


async def test_a_snapshot_and_then_changes():
    mirror = BlockMirror("m", SIZE, 100_000)
    mirror.apply(stored(0, 3000))
    async with kvstore() as store, publishing(store, mirror) as publisher:
        await store.until(lambda: len(store.held()) == 3000)
        assert store.batches[0].snapshot
        publisher.add(mirror.apply(stored(3000, 100)), 50)
        publisher.add(mirror.apply(removed(*range(1990, 2060))), 51)
        await store.until(lambda: store.picture() == expected(mirror))
        assert [b.sequence for b in store.batches] == list(range(1, len(store.batches) + 1))
        assert {(b.worker_id, b.epoch) for b in store.batches} == {("w", 7)}
        assert [b.occurred_unix_ms for b in store.batches if not b.snapshot][-1] in (50, 51)
        assert publisher.snapshots == 1


async def test_changes_during_a_snapshot_come_after_it(monkeypatch):
    monkeypatch.setattr(publisher_module, "BLOCKS_PER_MESSAGE", 10)
    mirror = BlockMirror("m", SIZE, 100_000)
    mirror.apply(stored(0, 3000))
    async with kvstore() as store, publishing(store, mirror) as publisher:
        await store.until(lambda: store.batches)
        publisher.add(mirror.apply(removed(2, 1500, 2999)), 1)
        publisher.add(mirror.apply(stored(3000, 5)), 1)
        await store.until(lambda: store.picture() == expected(mirror))
        mirror.clear()
        publisher.clear(1)
        publisher.add(mirror.apply(stored(0, 5)), 1)
        await store.until(lambda: store.picture() == expected(mirror))
        assert sum(b.snapshot for b in store.batches) == 1


async def test_too_many_pending_changes_become_a_snapshot(monkeypatch):
    monkeypatch.setattr(publisher_module, "MAX_PENDING_BLOCKS", 50)
    mirror = BlockMirror("m", SIZE, 100_000)
    async with kvstore() as store, publishing(store, mirror) as publisher:
        await store.until(lambda: store.batches)
        for first in range(0, 200, 10):
            publisher.add(mirror.apply(stored(first, 10)), 1)
            assert publisher.num_pending <= 51
        await store.until(lambda: store.picture() == expected(mirror))
        assert sum(b.snapshot for b in store.batches) == 2


async def test_nothing_is_sent_while_nothing_changes():
    mirror = BlockMirror("m", SIZE, 100)
    async with kvstore() as store, publishing(store, mirror) as publisher:
        await store.until(lambda: store.batches)
        publisher.add([], 1)
        await some_time(store)
        assert len(store.batches) == 1


async def test_a_refusal_is_logged_once_with_its_reason(caplog):
    mirror = BlockMirror("m", SIZE, 100)
    async with kvstore() as store, publishing(store, mirror):
        store.refusal = (grpc.StatusCode.FAILED_PRECONDITION, "epoch 7 has ended")
        await store.until(lambda: len(store.batches) >= 3)
        store.refusal = None
        await store.until(lambda: store.batches[-1].snapshot and len(store.batches) >= 4)
    logged = [r for r in caplog.records if r.message == "kvstore refuses block events"]
    assert [(r.code, r.detail) for r in logged] == [("FAILED_PRECONDITION", "epoch 7 has ended")]


async def test_nothing_is_published_before_the_kvstore_knows_the_worker():
    mirror, registered = BlockMirror("m", SIZE, 100), asyncio.Event()
    async with kvstore() as store, channel(f"127.0.0.1:{store.port}") as connected:
        publisher = BlockPublisher(connected, "w", 7, mirror.pages, 0.001)
        running = asyncio.create_task(publisher.run(registered.wait))
        await some_time(store)
        assert store.batches == []
        registered.set()
        await store.until(lambda: store.batches)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
