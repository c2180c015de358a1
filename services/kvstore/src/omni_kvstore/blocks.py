"""Changes of what workers hold, as values. No Redis, no wire."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from omni_common.blocks import KEY_BYTES

POSITION_BYTES = 4
_MAX_PART_EVENTS = 1024


class Action(StrEnum):
    STORED = "stored"
    REMOVED = "removed"
    CLEARED = "cleared"


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """`keys` are `KEY_BYTES` each, all of one span; `medium` is the wire's number of it.

    `positions` are big-endian 32-bit: one per key, or only the first where the others follow it.
    """

    action: Action
    medium: int
    keys: bytes
    span: bytes = b""
    positions: bytes = b""

    def __len__(self) -> int:
        return len(self.keys) // KEY_BYTES

    def piece(self, start: int, stop: int) -> "BlockEvent":
        """The part for keys `start` to `stop`."""
        keys = self.keys[start * KEY_BYTES : stop * KEY_BYTES]
        if len(self.positions) == POSITION_BYTES:
            first = int.from_bytes(self.positions, "big") + start
            positions = first.to_bytes(POSITION_BYTES, "big")
        else:
            positions = self.positions[start * POSITION_BYTES : stop * POSITION_BYTES]
        return BlockEvent(self.action, self.medium, keys, self.span, positions)


@dataclass(frozen=True, slots=True)
class BlockChange:
    """What an epoch of a worker did; `model` is the worker's."""

    worker_id: str
    epoch: int
    event: BlockEvent
    model: str = ""


@dataclass(frozen=True, slots=True)
class Batch:
    """Events of one (worker, epoch); a snapshot replaces all that is known of the worker.

    `occurred_ms` is when the engine reported the first event, Unix time; 0 where that is not known.
    """

    worker_id: str
    epoch: int
    sequence: int
    snapshot: bool
    events: tuple[BlockEvent, ...]
    occurred_ms: int = 0

    def as_changes(self) -> tuple[BlockEvent, ...]:
        """The events; those of a snapshot follow a clear."""
        return (BlockEvent(Action.CLEARED, 0, b""), *self.events) if self.snapshot else self.events


@dataclass(frozen=True, slots=True)
class Match:
    """With tiers up to this one a worker's prefix has `num_blocks`; `pool` names the tier where it is a pool's.

    An empty `worker_id` stands for every worker without a match of its own.
    """

    worker_id: str
    medium: int
    pool: str
    num_blocks: int


def pack_positions(positions: "Sequence[int] | npt.NDArray[np.uint32]") -> bytes:
    """32-bit big-endian."""
    if len(positions) == 1:
        return int(positions[0]).to_bytes(POSITION_BYTES, "big")
    return np.asarray(positions, dtype=">u4").tobytes()


def unpack_positions(positions: bytes) -> npt.NDArray[np.uint32]:
    """The reverse of `pack_positions`."""
    return np.frombuffer(positions, dtype=">u4").astype(np.uint32)


def parts_of(batch: Batch, max_blocks: int) -> list[tuple[BlockEvent, ...]]:
    """Cut a batch into parts of at most `max_blocks` blocks, in order; at least one part, maybe empty."""
    parts: list[list[BlockEvent]] = [[]]
    room = max_blocks
    for event in batch.events:
        if len(event) <= room and len(parts[-1]) < _MAX_PART_EVENTS:
            parts[-1].append(event)
            room -= len(event)
            continue
        for start, stop in _pieces(len(event), room, max_blocks):
            if room == 0 or len(parts[-1]) == _MAX_PART_EVENTS:
                parts.append([])
                room = max_blocks
            parts[-1].append(event.piece(start, stop) if stop - start < len(event) else event)
            room -= stop - start
    return [tuple(part) for part in parts]


def _pieces(length: int, room: int, max_blocks: int) -> Iterator[tuple[int, int]]:
    """Bounds of the pieces of an event: the first fills the room that is left. An event without keys is one piece."""
    start, stop = 0, min(length, room or max_blocks)
    while True:
        yield start, stop
        if stop == length:
            return
        start, stop = stop, min(length, stop + max_blocks)
