"""KV blocks of a simulated engine: a prefix cache with reference counts. Pure.

free --allocate--> held --register--> held and named --release--> evictable (LRU) --allocate--> held, name removed
  ^-----------------release of an unnamed block-----+                   |
                                                      held <--match-----+
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import xxhash

from omni_engine.ports import BlockEvent, BlocksRemoved, BlocksStored


def chain_hashes(token_ids: Sequence[int], block_size: int, salt: str, adapter: str = "") -> list[bytes]:
    """The engine's own names of the full blocks of `token_ids`."""
    last = xxhash.xxh3_64_digest(b"sim" + salt.encode())
    if adapter:
        last = xxhash.xxh3_64_digest(last + adapter.encode())
    data = np.asarray(token_ids, dtype="<u4").tobytes()
    size = 4 * block_size
    hashes = []
    for start in range(0, len(data) - size + 1, size):
        last = xxhash.xxh3_64_digest(last + data[start : start + size])
        hashes.append(last)
    return hashes


class BlockPool:
    """Owns every block; `events` collects what changed since `take_events`."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._references = [0] * num_blocks
        self._name_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._events: list[BlockEvent] = []

    @property
    def num_available(self) -> int:
        return len(self._free) + len(self._evictable)

    @property
    def usage(self) -> float:
        """Share of blocks that something holds, [0, 1]."""
        return 1 - self.num_available / self._num_blocks

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Hold and return the blocks of the longest known prefix."""
        blocks = []
        for name in hashes:
            block = self._block_of.get(name)
            if block is None:
                break
            if self._references[block] == 0:
                del self._evictable[block]
            self._references[block] += 1
            blocks.append(block)
        return blocks

    def allocate(self, count: int) -> list[int] | None:
        """Hold `count` fresh blocks, evicting the longest unused; None if there are not enough."""
        if count > self.num_available:
            return None
        evicted = []
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._evictable.popitem(last=False)
                name = self._name_of.pop(block)
                del self._block_of[name]
                evicted.append(name)
            self._references[block] = 1
            blocks.append(block)
        if evicted:
            self._events.append(BlocksRemoved(evicted))
        return blocks

    def register(
        self,
        blocks: Sequence[int],
        hashes: Sequence[bytes],
        first: int,
        token_ids: Sequence[int],
        salt: str,
        adapter: str = "",
    ) -> None:
        """Name the full blocks from index `first` on; a name that another block has stays with that one.

        Those before them whose name went with another block are named too: a block without its parent is never found.
        """
        size = self._block_size
        while 0 < first < len(hashes) and hashes[first - 1] not in self._block_of:
            first -= 1
        for index in range(first, len(hashes)):
            name, block = hashes[index], blocks[index]
            if name in self._block_of:
                continue
            self._block_of[name] = block
            self._name_of[block] = name
            parent = hashes[index - 1] if index else None
            tokens = list(token_ids[index * size : (index + 1) * size])
            self._events.append(BlocksStored([name], parent, tokens, size, cache_salt=salt, adapter=adapter))

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of blocks; the tail of a prefix is evicted before its head."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._name_of:
                self._evictable[block] = None
            else:
                self._free.append(block)

    def take_events(self) -> list[BlockEvent]:
        events, self._events = self._events, []
        return events
