"""The engine's block hashes -> our block keys, and the set of blocks it holds. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from omni_common.blocks import BlockChain, root_key
from omni_engine.ports import BlockEvent, BlocksCleared, BlocksRemoved, BlocksStored, Medium

Action = Literal["stored", "removed", "cleared"]


@dataclass(frozen=True, slots=True)
class KeyEvent:
    """A block event in our keys, joined, 16 bytes each; a cleared one has neither keys nor medium."""

    action: Action
    medium: Medium | None = None
    keys: bytes = b""


@dataclass(slots=True)
class _Block:
    key: bytes
    media: set[Medium] = field(default_factory=set)


class BlockMirror:
    """Which blocks the engine holds, by its hash; bounded by `max_blocks`.

    A block whose parent is unknown cannot be named, since a key covers its whole prefix: it is skipped and counted.
    """

    def __init__(self, model: str, block_size: int, max_blocks: int) -> None:
        self._model = model
        self._block_size = block_size
        self._max_blocks = max_blocks
        self._blocks: dict[bytes, _Block] = {}
        self.skipped = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def apply(self, event: BlockEvent) -> KeyEvent | None:
        """The event in our keys; None if nothing of it could be named."""
        match event:
            case BlocksStored():
                keys = self._store(event)
                return KeyEvent("stored", event.medium, keys) if keys else None
            case BlocksRemoved():
                keys = self._remove(event.block_hashes, event.medium)
                return KeyEvent("removed", event.medium, keys) if keys else None
            case BlocksCleared():
                self._blocks.clear()
                return KeyEvent("cleared")

    def held(self) -> Iterator[tuple[Medium, bytes]]:
        """Joined keys of every block, per medium."""
        for medium in Medium:
            keys = b"".join(block.key for block in self._blocks.values() if medium in block.media)
            if keys:
                yield medium, keys

    def _store(self, event: BlocksStored) -> bytes:
        chain = self._chain_after(event)
        if chain is None or event.block_size != self._block_size:
            self.skipped += len(event.block_hashes)
            return b""
        stored, size = bytearray(), event.block_size
        for index, block_hash in enumerate(event.block_hashes):
            key = chain.extend(event.token_ids[index * size : (index + 1) * size])
            block = self._blocks.get(block_hash)
            if not key or (block is None and len(self._blocks) >= self._max_blocks):
                self.skipped += len(event.block_hashes) - index
                break
            if block is None:
                block = self._blocks[block_hash] = _Block(key)
            block.media.add(event.medium)
            stored += key
        return bytes(stored)

    def _chain_after(self, event: BlocksStored) -> BlockChain | None:
        if event.parent is None:
            return BlockChain(root_key(self._model, event.adapter, event.cache_salt), self._block_size)
        parent = self._blocks.get(event.parent)
        return None if parent is None else BlockChain(parent.key, self._block_size)

    def _remove(self, block_hashes: Sequence[bytes], medium: Medium) -> bytes:
        removed = bytearray()
        for block_hash in block_hashes:
            block = self._blocks.get(block_hash)
            if block is None or medium not in block.media:
                self.skipped += 1
                continue
            block.media.discard(medium)
            removed += block.key
            if not block.media:
                del self._blocks[block_hash]
        return bytes(removed)
