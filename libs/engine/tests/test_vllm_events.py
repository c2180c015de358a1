"""vLLM's events as our values, and its ZMQ stream followed through losses. No vLLM needed."""

import asyncio
import itertools
from contextlib import asynccontextmanager

import msgspec
import pytest
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st

from omni_common.blocks import block_extra
from omni_engine.ports import BlocksCleared, BlocksRemoved, BlocksStored, EventBatch, Medium
from omni_engine.vllm_event_stream import EventStream
from omni_engine.vllm_events import EventReader, KvGroups

FULL = {"group_idx": 0, "kind": "full_attention", "block_size": 2, "sliding_window": None}
WINDOW = {"group_idx": 1, "kind": "sliding_window", "block_size": 2, "sliding_window": 8}
STATE = {"group_idx": 2, "kind": "mamba", "block_size": 2, "sliding_window": None}
ONE = [FULL]


def stored(count=1, **fields):
    plain = {
        "type": "BlockStored",
        "block_hashes": list(range(10, 10 + count)),
        "parent_block_hash": None,
        "token_ids": list(range(2 * count)),
        "block_size": 2,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * count,
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }
    return plain | fields


def removed(*hashes, **fields):
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU", "group_idx": 0} | fields


def read(*events, groups=ONE, ts=1.5):
    payload = msgspec.msgpack.encode([ts, list(events), 0])
    return EventReader(KvGroups(groups)).read(3, payload)


def name(number):
    return number.to_bytes(8, "little")


def test_a_batch_keeps_its_number_time_and_order():
    batch = read(removed(7), stored(2, parent_block_hash=7), {"type": "AllBlocksCleared"})
    assert batch == EventBatch(
        3,
        [
            BlocksRemoved([name(7)]),
            BlocksStored([name(10), name(11)], name(7), [0, 1, 2, 3], 2),
            BlocksCleared(),
        ],
        1500,
    )


def test_hashes_may_be_bytes():
    (event,) = read(stored(block_hashes=[b"h" * 32], parent_block_hash=b"p" * 32)).events
    assert (event.block_hashes, event.parent) == ([b"h" * 32], b"p" * 32)


MM = ["image", -3]


@pytest.mark.parametrize(
    ("fields", "salt", "adapter", "extras"),
    [
        pytest.param({}, "", "", (), id="plain"),
        pytest.param({"extra_keys": [["s"], None]}, "s", "", (), id="salt"),
        pytest.param({"extra_keys": [["l", "s"], ["l"]], "lora_name": "l", "lora_id": 1}, "s", "l", (), id="adapter"),
        pytest.param({"extra_keys": [["l", "l"], ["l"]], "lora_name": "l"}, "l", "l", (), id="salt like the adapter"),
        pytest.param({"extra_keys": [[MM], None]}, "", "", (block_extra([("image", -3)]), b""), id="image, no salt"),
        pytest.param(
            {"extra_keys": [[MM, ["b", 1], "s"], [["b", -1]]]},
            "s",
            "",
            (block_extra([("image", -3), ("b", 1)]), block_extra([("b", -1)])),
            id="images and salt",
        ),
        pytest.param(
            {"extra_keys": [["l", MM, "s", b"d"], ["l", b"e"]], "lora_name": "l"},
            "s",
            "l",
            (block_extra([("image", -3)], b"d"), block_extra(embeds=b"e")),
            id="all of them",
        ),
    ],
)
def test_what_a_block_depends_on(fields, salt, adapter, extras):
    (event,) = read(stored(2, **fields)).events
    assert (event.cache_salt, event.adapter, tuple(event.extras)) == (salt, adapter, extras)
    assert list(event.token_ids) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"extra_keys": None}, id="not told"),
        pytest.param({"extra_keys": [None]}, id="told of fewer blocks"),
        pytest.param({"extra_keys": [None, ["s"]]}, id="a string on a later block"),
        pytest.param({"extra_keys": [["s"], None], "parent_block_hash": 5}, id="a string within a prompt"),
        pytest.param({"extra_keys": [["a", "b"], None]}, id="two strings"),
        pytest.param({"extra_keys": [[["a", 1, 2]], None]}, id="a longer tuple"),
        pytest.param({"extra_keys": [[[1, "a"]], None]}, id="another tuple"),
        pytest.param({"extra_keys": [[7], None]}, id="a number"),
        pytest.param({"extra_keys": [["x"], ["x"]], "lora_name": "l"}, id="another adapter"),
        pytest.param({"extra_keys": [None, None], "lora_name": "l"}, id="an adapter that is not in the keys"),
        pytest.param({"extra_keys": [["l"], ["l"]], "lora_id": 4}, id="an adapter without a name"),
        pytest.param({"token_ids": [], "block_size": 0, "extra_keys": None}, id="a connector's placeholder"),
    ],
)
def test_content_that_is_not_told_plainly_is_not_guessed(fields):
    """The hashes pass: blocks that are known by them keep their keys."""
    (event,) = read(stored(2, **fields)).events
    assert (event.token_ids, event.cache_salt, event.adapter, event.extras) == ((), "", "", ())
    assert event.block_hashes == [name(10), name(11)]


@pytest.mark.parametrize(
    ("medium", "locality", "expected"),
    [
        ("GPU", None, Medium.HBM),
        ("CPU", None, Medium.HOST),
        ("CPU", "LOCAL", Medium.HOST),
        ("STORAGE", "LOCAL", Medium.DISK),
        ("STORAGE", "REMOTE", Medium.REMOTE),
        ("CPU", "REMOTE", Medium.REMOTE),
        ("cpu", None, None),
        ("TAPE", "REMOTE", None),
        (None, None, None),
        ("CPU", "ELSEWHERE", None),
    ],
)
def test_media(medium, locality, expected):
    batch = read(*(event | {"medium": medium, "locality": locality} for event in (stored(), removed(1, 2))))
    assert [event.medium for event in batch.events] == ([expected] * 2 if expected else [])
    assert batch.skipped == ({} if expected else {"medium": 3})


@pytest.mark.parametrize(
    ("groups", "kept", "skipped"),
    [
        pytest.param([FULL, WINDOW, STATE], [(0, 0)], 3, id="window and state layers are left out"),
        pytest.param([FULL, WINDOW | {"kind": "mla_attention"}, STATE], [(0, 0), (1, 1)], 2, id="two that count"),
        pytest.param([FULL | {"kind": "unknown"}, WINDOW], [], 4, id="none that counts"),
    ],
)
def test_groups_of_layers(groups, kept, skipped, caplog):
    batch = read(*(event | {"group_idx": g} for g in (0, 1, 2, None) for event in (stored(),)), groups=groups)
    assert [(event.group, event.block_hashes[0] == name(10)) for event in batch.events] == [(g, True) for _, g in kept]
    assert batch.skipped == {"group": skipped}
    assert "some layers are left out" in caplog.text


def test_one_group_needs_no_number():
    assert len(read(stored(group_idx=None), removed(1, group_idx=None)).events) == 2


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        pytest.param(stored(block_hashes="text"), [], id="a store that cannot be read"),
        pytest.param(stored(token_ids=None), [], id="a store without tokens"),
        pytest.param(removed("text"), [BlocksCleared()], id="a removal that cannot be read"),
        pytest.param(removed(-1), [BlocksCleared()], id="a hash below 0"),
        pytest.param({"type": "BlockMoved"}, [BlocksCleared()], id="an event of another kind"),
        pytest.param({"kind": 4}, [BlocksCleared()], id="no event at all"),
        pytest.param(17, [BlocksCleared()], id="a number"),
    ],
)
def test_what_cannot_be_read_costs_itself_only_and_never_hides_a_removal(event, expected, caplog):
    reader = EventReader(KvGroups(ONE))
    payload = msgspec.msgpack.encode([0.0, [stored(), event, removed(10)], 0])
    for _ in range(3):
        batch = reader.read(1, payload)
        assert batch.events[1:-1] == expected
        assert batch.skipped == {"unreadable": 1}
    assert len([r for r in caplog.records if r.message == "block events not understood"]) == 1


@given(st.binary(max_size=40))
def test_any_bytes_are_a_batch(payload):
    batch = EventReader(KvGroups(ONE)).read(9, payload)
    assert batch.sequence == 9
    assert batch.skipped or batch.events == []


def test_fields_that_a_later_vllm_adds_are_ignored():
    assert len(read(stored(session_id="s", ownership="kvcr", novelty=[1])).events) == 1


class Publisher:
    """As vLLM's: PUB with consecutive numbers from 0, and a ROUTER that repeats what it keeps."""

    def __init__(self, folder, keep=1000):
        self.context = zmq.asyncio.Context()
        self.events, self.replays = (f"ipc://{folder}/{name}" for name in ("events", "replay"))
        self.pub = self.context.socket(zmq.PUB)
        self.pub.bind(self.events)
        self.router = self.context.socket(zmq.ROUTER)
        self.router.bind(self.replays)
        self.keep, self.kept = keep, []
        self.numbers = itertools.count()
        self.last = -1
        self.drops = set()

    async def publish(self, is_lost=False):
        self.last = number = next(self.numbers)
        frames = [b"", number.to_bytes(8, "big"), str(number).encode()]
        self.kept = [*self.kept, frames][-self.keep :]
        if not is_lost:
            await self.pub.send_multipart(frames)

    async def answer(self):
        while True:
            client, _, first = await self.router.recv_multipart()
            for frames in self.kept:
                number = int.from_bytes(frames[1], "big")
                if number in self.drops:
                    self.drops.discard(number)
                elif frames[1] >= first:
                    await self.router.send_multipart([client, b"", *frames])
            await self.router.send_multipart([client, b"", b"", b"\xff" * 8, b""])


@asynccontextmanager
async def publisher(folder, answers=True, **values):
    published = Publisher(folder, **values)
    tasks = [asyncio.create_task(published.answer())] if answers else []
    try:
        yield published
    finally:
        for task in tasks:
            task.cancel()
        published.context.destroy(linger=0)


@asynccontextmanager
async def following(published, replay_timeout_s=5.0):
    stream = EventStream(published.events, published.replays, replay_timeout_s)
    batches = aiter(stream)
    try:
        yield batches
    finally:
        await batches.aclose()
        stream.close()


async def take(batches, count):
    async with asyncio.timeout(10):
        return [await anext(batches) for _ in range(count)]


async def connected(published, batches):
    """Publish until the subscription works, and read all of it; returns what was read."""
    first = asyncio.ensure_future(anext(batches))
    async with asyncio.timeout(10):
        while not first.done():
            await published.publish()
            await asyncio.wait({first}, timeout=0.01)
        seen = [await first]
        while seen[-1].sequence != published.last:
            seen.append(await anext(batches))
    return seen


async def test_a_late_start_is_replayed_from_the_first_batch(tmp_path):
    async with publisher(tmp_path) as published:
        for _ in range(3):
            await published.publish()
        async with following(published) as batches:
            seen = await connected(published, batches)
            assert [b.sequence for b in seen] == list(range(published.last + 1))
            assert seen[0].is_replayed


async def test_a_gap_is_filled(tmp_path):
    async with publisher(tmp_path) as published, following(published) as batches:
        await connected(published, batches)
        first = published.last + 1
        for is_lost in (False, True, True, False, False):
            await published.publish(is_lost)
        seen = await take(batches, 5)
        assert [b.sequence for b in seen] == list(range(first, first + 5))
        assert [b.payload for b in seen] == [str(b.sequence).encode() for b in seen]
        assert not seen[0].is_replayed
        assert seen[1].is_replayed and seen[2].is_replayed


async def test_holes_in_a_replay_are_asked_for_again(tmp_path):
    async with publisher(tmp_path) as published, following(published) as batches:
        await connected(published, batches)
        first = published.last + 1
        published.drops = {first + 2, first + 4}
        for is_lost in (True, True, True, True, True, False):
            await published.publish(is_lost)
        assert [b.sequence for b in await take(batches, 6)] == list(range(first, first + 6))


async def test_what_the_publisher_does_not_keep_stays_missing(tmp_path):
    async with publisher(tmp_path, keep=2) as published, following(published) as batches:
        await connected(published, batches)
        first = published.last + 1
        for is_lost in (True, True, True, False):
            await published.publish(is_lost)
        assert [b.sequence for b in await take(batches, 2)] == [first + 2, first + 3]


async def test_a_publisher_that_does_not_answer_costs_bounded_time(tmp_path):
    async with publisher(tmp_path, answers=False) as published, following(published, 0.05) as batches:
        await connected(published, batches)
        for is_lost in (True, False):
            await published.publish(is_lost)
        (seen,) = await take(batches, 1)
        assert (seen.sequence, seen.is_replayed) == (published.last, False)


async def test_another_publisher_starts_over(tmp_path):
    async with publisher(tmp_path) as published, following(published) as batches:
        await connected(published, batches)
        published.numbers, published.kept = itertools.count(), []
        for _ in range(2):
            await published.publish()
        assert [b.sequence for b in await take(batches, 2)] == [0, 1]
