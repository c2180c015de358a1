"""The engine's block hashes -> our block keys, and the set of blocks it holds. Pure."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from omni_common.blocks import KEY_BYTES, SPAN_BLOCKS, BlockChain, root_key
from omni_engine.ports import BlocksRemoved, BlocksStored, Medium

_MEDIA = tuple(Medium)
_ROW_OF = {medium: row for row, medium in enumerate(_MEDIA)}


class Block(NamedTuple):
    """A block's name and place: `position` counts the blocks of its prompt from 0, `span` is its span's first key."""

    key: bytes
    position: int
    span: bytes


class Change(NamedTuple):
    """A block that came to a medium (`is_held`) or left it."""

    medium: Medium
    block: Block
    is_held: bool


@dataclass(slots=True)
class _Entry:
    """`copies` counts what the engine told of, for each medium and group: `_ROW_OF[medium] * groups + group`."""

    block: Block
    copies: list[int]


class BlockMirror:
    """Which blocks the engine holds, by its hash; bounded by `max_blocks`.

    An engine may hold one block several times and reports every copy it makes and drops, so copies are counted. A
    block lies on a medium while each of `num_groups` groups of layers has a copy there.

    What cannot be named is skipped and counted in `skipped`: a key covers a block's whole prefix, so a block whose
    parent is unknown has none. The mirror may therefore lack blocks; it never has one that the engine lacks.
    """

    def __init__(self, model: str, block_size: int, max_blocks: int, num_groups: int = 1) -> None:
        self._model = model
        self._block_size = block_size
        self._max_blocks = max_blocks
        self._num_groups = num_groups
        self._entries: dict[bytes, _Entry] = {}
        self.skipped: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def apply(self, event: BlocksStored | BlocksRemoved) -> list[Change]:
        """Count the event's copies; returns the blocks that came to a medium or left it."""
        if isinstance(event, BlocksStored):
            return self._store(event)
        return self._remove(event)

    def clear(self) -> None:
        """Nothing is held any more, or it is not known what is."""
        self._entries = {}

    def pages(self, size: int) -> Iterator[tuple[Medium, list[Block]]]:
        """What is held, at most `size` blocks at a time.

        The mirror may change between pages: a block that left is not told, one that came is not told either.
        """
        mirrored = self._entries
        entries = list(mirrored.values())
        for start in range(0, len(entries), size):
            if self._entries is not mirrored:
                return
            page = entries[start : start + size]
            for medium in Medium:
                blocks = [entry.block for entry in page if self._holds(entry, _ROW_OF[medium])]
                if blocks:
                    yield medium, blocks

    def _holds(self, entry: _Entry, row: int) -> bool:
        first = row * self._num_groups
        return entry.copies[first] > 0 if self._num_groups == 1 else all(entry.copies[first : first + self._num_groups])

    def _store(self, event: BlocksStored) -> list[Change]:
        self._name(event)
        changes = []
        row = _ROW_OF[event.medium]
        for block_hash in event.block_hashes:
            entry = self._entries.get(block_hash)
            if entry is None:
                continue
            was_held = self._holds(entry, row)
            entry.copies[row * self._num_groups + event.group] += 1
            if not was_held and self._holds(entry, row):
                changes.append(Change(event.medium, entry.block, True))
        return changes

    def _remove(self, event: BlocksRemoved) -> list[Change]:
        changes = []
        row = _ROW_OF[event.medium]
        slot = row * self._num_groups + event.group
        for block_hash in event.block_hashes:
            entry = self._entries.get(block_hash)
            if entry is None or not entry.copies[slot]:
                self.skipped["unknown"] += 1
                continue
            was_held = self._holds(entry, row)
            entry.copies[slot] -= 1
            if was_held and not self._holds(entry, row):
                changes.append(Change(event.medium, entry.block, False))
            if not any(entry.copies):
                del self._entries[block_hash]
        return changes

    def _name(self, event: BlocksStored) -> None:
        """Make an entry for each new block that can be named. A known hash keeps its key: a hash covers the prefix."""
        hashes = event.block_hashes
        before = self._before(event)
        index = 0
        while index < len(hashes):
            entry = self._entries.get(hashes[index])
            if entry is not None:
                before = entry.block
                index += 1
                continue
            stop = index + 1
            while stop < len(hashes) and hashes[stop] not in self._entries:
                stop += 1
            if reason := self._refusal(event, before):
                self.skipped[reason] += stop - index
            elif before is not None:
                before = self._name_run(event, before, index, stop)
            index = stop

    def _before(self, event: BlocksStored) -> Block | None:
        """The block the event's first one follows; the empty prefix counts as one at position -1."""
        if event.parent is None:
            return Block(root_key(self._model, event.adapter, event.cache_salt), -1, b"")
        entry = self._entries.get(event.parent)
        return entry.block if entry else None

    def _refusal(self, event: BlocksStored, before: Block | None) -> str:
        if not event.token_ids:
            return "content"
        if event.block_size != self._block_size:
            return "block_size"
        if len(event.token_ids) != len(event.block_hashes) * self._block_size:
            return "content"
        return "" if before else "parent"

    def _name_run(self, event: BlocksStored, before: Block, start: int, stop: int) -> Block | None:
        """Enter blocks `start` to `stop`, none of them known; returns the last, None if there was no room for it."""
        stop_named = min(stop, start + max(0, self._max_blocks - len(self._entries)))
        if stop_named < stop:
            self.skipped["full"] += stop - stop_named
        tokens = event.token_ids[start * self._block_size : stop_named * self._block_size]
        keys = BlockChain(before.key, self._block_size).extend(tokens, event.extras[start:stop_named])
        block = before
        for index, block_hash in enumerate(event.block_hashes[start:stop_named]):
            key = keys[index * KEY_BYTES : (index + 1) * KEY_BYTES]
            position = block.position + 1
            block = Block(key, position, key if position % SPAN_BLOCKS == 0 else block.span)
            self._entries[block_hash] = _Entry(block, [0] * (len(_MEDIA) * self._num_groups))
        return block if stop_named == stop else None
