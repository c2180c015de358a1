"""vLLM's own block pool and publisher, without an engine: what they report is what the mirror takes them to report.

Runs on every vLLM the adapter supports; needs vLLM, hence the mark.
"""

import asyncio
import random
from typing import Any

import msgspec
import pytest

from omni_common.blocks import KEY_BYTES, block_extra, block_keys, root_key
from omni_engine.hosting.mirror import BlockMirror
from omni_engine.ports import BlocksCleared, BlocksRemoved, BlocksStored, Medium
from omni_engine.vllm_event_stream import EventStream
from omni_engine.vllm_events import EventReader, KvGroups

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

SIZE = 4
GROUPS = [{"group_idx": 0, "kind": "full_attention", "block_size": SIZE, "sliding_window": None}]


def new_pool(num_blocks: int) -> Any:
    from vllm.v1.core.block_pool import BlockPool

    return BlockPool(num_blocks, enable_caching=True, hash_block_size=SIZE, enable_kv_cache_events=True)


def new_request(name: str, tokens: list[int], **fields: Any) -> Any:
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(SIZE, sha256)
    return Request(name, tokens, SamplingParams(max_tokens=1), None, block_hasher=hasher, **fields)


def images(*placed: tuple[str, int, int]) -> list[Any]:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    return [
        MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset=offset, length=length))
        for name, offset, length in placed
    ]


def lora(name: str) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=name, lora_int_id=1, lora_path="/nowhere")


def serve(pool: Any, request: Any, reuse: bool = True) -> list[Any]:
    """Hold blocks for a prompt and name the full ones, as the cache manager does; returns them."""
    count, cached = len(request.all_token_ids) // SIZE, []
    while reuse and len(cached) < count and (found := pool.get_cached_block(request.block_hashes[len(cached)], [0])):
        cached += found
    pool.touch(cached)
    blocks = [*cached, *pool.get_new_blocks(count - len(cached))]
    pool.cache_full_blocks(request, blocks, len(cached), count, SIZE, 0)
    return blocks


def events_of(pool: Any) -> list[Any]:
    from vllm.distributed.kv_events import KVEventBatch

    payload = msgspec.msgpack.encode(KVEventBatch(ts=1.0, events=pool.take_events()))
    batch = EventReader(KvGroups(GROUPS)).read(0, payload)
    assert not batch.skipped
    return list(batch.events)


def follow(mirror: BlockMirror, pool: Any) -> None:
    for event in events_of(pool):
        if isinstance(event, BlocksCleared):
            mirror.clear()
        else:
            mirror.apply(event)


def held(mirror: BlockMirror) -> set[bytes]:
    return {block.key for medium, blocks in mirror.pages(100) for block in blocks if medium is Medium.HBM}


def split(keys: bytes) -> list[bytes]:
    return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]


def test_every_copy_of_a_block_is_reported_when_it_comes_and_when_it_goes() -> None:
    pool, request = new_pool(10), new_request("a", list(range(SIZE)))
    first, second = serve(pool, request, reuse=False), serve(pool, request, reuse=False)
    pool.free_blocks([*first, *second])
    assert [type(e) for e in events_of(pool)] == [BlocksStored, BlocksStored]
    pool.evict_blocks({first[0].block_id})
    assert [type(e) for e in events_of(pool)] == [BlocksRemoved]
    assert pool.get_cached_block(request.block_hashes[0], [0]) == second
    pool.evict_blocks({second[0].block_id})
    assert [type(e) for e in events_of(pool)] == [BlocksRemoved]
    assert pool.get_cached_block(request.block_hashes[0], [0]) is None


def embeddings(count: int) -> Any:
    import torch

    return torch.arange(2 * count, dtype=torch.float32).reshape(count, 2)


def digest(start: int) -> bytes:
    import hashlib

    return hashlib.sha256(embeddings(20)[start : start + SIZE].contiguous().numpy().tobytes()).digest()


TOKENS = list(range(2 * SIZE))
CASES = [
    pytest.param({}, "", "", [], id="plain"),
    pytest.param({"cache_salt": "s"}, "s", "", [], id="salt"),
    pytest.param({"lora": "l"}, "", "l", [], id="adapter"),
    pytest.param({"lora": "l", "cache_salt": "l"}, "l", "l", [], id="salt like the adapter"),
    pytest.param({"images": [("i", 1, 2)]}, "", "", [block_extra([("i", 1)]), b""], id="image in the first block"),
    pytest.param(
        {"images": [("i", 1, 5), ("j", 7, 1)], "cache_salt": "s", "lora": "l"},
        "s",
        "l",
        [block_extra([("i", 1)]), block_extra([("i", -3), ("j", 3)])],
        id="images over a border, salt and adapter",
    ),
    pytest.param(
        {"embeds": True, "cache_salt": "s"},
        "s",
        "",
        [block_extra(embeds=digest(0)), block_extra(embeds=digest(SIZE))],
        id="prompt embeddings",
    ),
]


@pytest.mark.parametrize(("fields", "salt", "adapter", "extras"), CASES)
def test_keys_follow_from_what_the_request_is(
    fields: dict[str, Any], salt: str, adapter: str, extras: list[bytes]
) -> None:
    values = dict(fields)
    if placed := values.pop("images", None):
        values["mm_features"] = images(*placed)
    if name := values.pop("lora", None):
        values["lora_request"] = lora(name)
    tokens: list[int] | None = TOKENS
    if values.pop("embeds", False):
        tokens, values["prompt_embeds"] = None, embeddings(2 * SIZE)
    pool, mirror = new_pool(10), BlockMirror("m", SIZE, 100)
    serve(pool, new_request("a", tokens, **values))  # type: ignore[arg-type]
    follow(mirror, pool)
    told = TOKENS if tokens else [0] * len(TOKENS)
    assert held(mirror) == set(split(block_keys(told, SIZE, root_key("m", adapter, salt), extras)))
    assert not mirror.skipped


@pytest.mark.parametrize("seed", range(30))
def test_the_mirror_has_what_the_pool_has_cached(seed: int) -> None:
    """Prompts that share prefixes, computed side by side, freed in any order, evicted and reset."""
    rng, pool, mirror = random.Random(seed), new_pool(40), BlockMirror("m", SIZE, 1000)
    key_of: dict[bytes, bytes] = {}
    running: list[list[Any]] = []
    for number in range(120):
        salt = rng.choice(["", "", "s"])
        tokens = [rng.randrange(2) for _ in range(SIZE * rng.randrange(1, 6) + rng.randrange(SIZE))]
        request = new_request(f"{number}", tokens, cache_salt=salt or None)
        keys = split(block_keys(tokens, SIZE, root_key("m", salt=salt)))
        key_of |= dict(zip(request.block_hashes, keys, strict=True))
        while running and (len(running) > 5 or rng.random() < 0.3):
            pool.free_blocks(reversed(running.pop(rng.randrange(len(running)))))
        running.append(serve(pool, request, reuse=rng.random() < 0.7))
        if rng.random() < 0.05:
            while running:
                pool.free_blocks(reversed(running.pop()))
            assert pool.reset_prefix_cache()
        follow(mirror, pool)
        cached = {block_hash for block_hash in key_of if pool.get_cached_block(block_hash, [0])}
        assert held(mirror) == {key_of[block_hash] for block_hash in cached}
    assert not mirror.skipped


async def test_what_the_publisher_lost_is_fetched_again(tmp_path: Any) -> None:
    from vllm.distributed.kv_events import KVEventBatch, ZmqEventPublisher

    endpoints = [f"ipc://{tmp_path}/{name}" for name in ("events", "replay")]
    publisher = ZmqEventPublisher(0, *endpoints, buffer_steps=5000)
    stream = EventStream(*endpoints)
    reader = EventReader(KvGroups(GROUPS))
    try:
        # Nobody hears the first thousands: the subscription comes too late, and more than a socket queues.
        for number in range(4000):
            publisher.publish(KVEventBatch(ts=float(number), events=[]))
        seen: list[int] = []

        async def read() -> None:
            async for raw in stream:
                batch = reader.read(raw.sequence, raw.payload, raw.is_replayed)
                assert batch.occurred_unix_ms == 1000 * raw.sequence
                seen.append(raw.sequence)

        reading = asyncio.create_task(read())
        async with asyncio.timeout(30):
            number = 4000
            while number - 1 not in seen[-1:]:
                publisher.publish(KVEventBatch(ts=float(number), events=[]))
                number += 1
                await asyncio.wait({reading}, timeout=0.05)
        reading.cancel()
        assert seen == list(range(number))
    finally:
        stream.close()
        publisher.shutdown()
