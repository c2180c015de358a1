"""What the index is compared with.

`DictIndex`     a plain Python dict of sets: block key -> names of the workers that hold it.
`PerBlock`      Redis as llm-d's index uses it: a hash per block key with a field per worker, and for a lookup one
                HKEYS per block of the prompt, all in one pipeline; the client intersects the answers.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from redis.asyncio import Redis

from omni_common.blocks import KEY_BYTES
from prefixindex.population import Prompt

_COMMANDS_PER_PIPELINE = 2000


def split(keys: bytes) -> list[bytes]:
    return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]


def depths(holders_of_blocks: Iterable[set[Any]]) -> dict[Any, int]:
    """Longest prefix of every holder of the first block, intersecting block by block until nobody is left."""
    found: dict[Any, int] = {}
    active: set[Any] | None = None
    blocks = 0
    for holders in holders_of_blocks:
        if active is None:
            active = set(holders)
        elif not active <= holders:
            found.update(dict.fromkeys(active - holders, blocks))
            active &= holders
        if not active:
            break
        blocks += 1
    return found | dict.fromkeys(active or (), blocks)


class DictIndex:
    """Block key -> set of workers. Knows no media, no order of eviction and no bound."""

    def __init__(self) -> None:
        self._holders: dict[bytes, set[str]] = {}

    def store(self, worker: str, keys: bytes) -> None:
        holders = self._holders
        for key in split(keys):
            known = holders.get(key)
            if known is None:
                holders[key] = {worker}
            else:
                known.add(worker)

    def remove(self, worker: str, keys: bytes) -> None:
        holders = self._holders
        for key in split(keys):
            known = holders.get(key)
            if known is not None:
                known.discard(worker)
                if not known:
                    del holders[key]

    def lookup(self, keys: bytes) -> dict[str, int]:
        nobody: set[str] = set()
        holders = self._holders
        return depths(
            holders.get(keys[offset : offset + KEY_BYTES], nobody) for offset in range(0, len(keys), KEY_BYTES)
        )


class PerBlock:
    """One hash per block and one command per block. The names of the hashes are the keys as they are."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    async def lookup(self, keys: bytes) -> dict[str, int]:
        pipeline = self._client.pipeline(transaction=False)
        for key in split(keys):
            pipeline.execute_command(b"HKEYS", key)
        found = depths(map(set, await pipeline.execute()))
        return {worker.decode(): blocks for worker, blocks in found.items()}


async def fill_per_block(port: int, prompts: Sequence[Prompt]) -> None:
    """Store all holders of a block with one command, past the client library: it fills faster and leaves the same."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for prompt in prompts:
        blocks = split(prompt.keys)
        for first, stop, fields in _held_alike(prompt):
            head = b"*%d\r\n$4\r\nHSET\r\n$%d\r\n" % (2 + 2 * len(fields), KEY_BYTES)
            tail = b"\r\n" + b"".join(b"$%d\r\n%b\r\n$0\r\n\r\n" % (len(name), name) for name in fields)
            for begin in range(first, stop, _COMMANDS_PER_PIPELINE):
                batch = blocks[begin : min(stop, begin + _COMMANDS_PER_PIPELINE)]
                writer.write(b"".join(head + key + tail for key in batch))
                for _ in batch:
                    if not (await reader.readline()).startswith(b":"):
                        raise ConnectionError("Redis refused a HSET")
    writer.close()
    await writer.wait_closed()


def _held_alike(prompt: Prompt) -> Iterator[tuple[int, int, list[bytes]]]:
    """First block, block after the last, and holders of every stretch of blocks with the same holders."""
    ranked = sorted(prompt.depths.items(), key=lambda item: item[1])
    first = 0
    for number, (_, depth) in enumerate(ranked):
        if depth > first:
            yield first, depth, [name.encode() for name, _ in ranked[number:]]
            first = depth
