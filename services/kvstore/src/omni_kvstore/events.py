"""Entries of the event stream and pages of blocks, as the scripts write them, to values."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from omni_common.blocks import KEY_BYTES
from omni_kvstore.blocks import Action, BlockEvent, pack_positions
from omni_kvstore.membership import Worker, WorkerLeft

MEDIA = range(1, 5)
_HEAD = struct.Struct(">BBI")
_CLEARED, _STORED, _REMOVED, _EVICTED = range(4)
_PAGE_ROW = np.dtype([("key", f"V{KEY_BYTES}"), ("position", ">u4"), ("media", "u1")])


@dataclass(frozen=True, slots=True)
class BlocksChanged:
    worker_id: str
    epoch: int
    events: tuple[BlockEvent, ...]


Event = Worker | WorkerLeft | BlocksChanged


def parsed(number: bytes, fields: dict[bytes, bytes]) -> tuple[int, Event]:
    """An entry of the stream, with its number."""
    return int(number.split(b"-")[0]), _event(fields)


def _event(fields: dict[bytes, bytes]) -> Event:
    worker_id, epoch = fields[b"worker"].decode(), int(fields[b"epoch"])
    match fields[b"kind"]:
        case b"blocks":
            packed = (value for name, value in fields.items() if name.isdigit())
            return BlocksChanged(worker_id, epoch, tuple(event for value in packed for event in _block_events(value)))
        case b"left":
            return WorkerLeft(worker_id, epoch, fields[b"model"].decode())
        case _:
            return Worker(
                worker_id,
                epoch,
                fields[b"model"].decode(),
                int(fields[b"block_size"]),
                fields[b"info"],
                fields[b"draining"] == b"1",
                int(fields[b"pool_medium"]),
            )


def _block_events(packed: bytes) -> Iterator[BlockEvent]:
    action, medium, count = _HEAD.unpack_from(packed)
    if action == _CLEARED:
        yield BlockEvent(Action.CLEARED, 0, b"")
        return
    keys_at = len(packed) - count * KEY_BYTES
    positions, keys = packed[_HEAD.size : keys_at], packed[keys_at:]
    if action == _STORED:
        yield BlockEvent(Action.STORED, medium, keys, positions=positions)
        return
    for gone_from in MEDIA if action == _EVICTED else (medium,):
        yield BlockEvent(Action.REMOVED, gone_from, keys)


def stored_page(packed: bytes) -> Iterator[BlockEvent]:
    """One event per medium of a page of blocks: rows of key, position, media."""
    rows = np.frombuffer(packed, dtype=_PAGE_ROW)
    for medium in MEDIA:
        held = rows[rows["media"] & (1 << medium) != 0]
        if len(held):
            yield BlockEvent(Action.STORED, medium, held["key"].tobytes(), positions=pack_positions(held["position"]))
