"""Block events as the scripts read them; entries of the event stream and pages of blocks as they write them."""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from omni_common.blocks import KEY_BYTES
from omni_kvstore.blocks import POSITION_BYTES, Action, BlockEvent, pack_positions
from omni_kvstore.membership import Worker, WorkerLeft

MEDIA = range(1, 5)
"""The wire's numbers: hbm, host, disk, remote."""
_HEAD = struct.Struct(">BBI")
_GIVEN = struct.Struct(">BBII")
_CLEARED, _STORED, _REMOVED, _EVICTED = range(4)
_ACTIONS = {Action.CLEARED: _CLEARED, Action.STORED: _STORED, Action.REMOVED: _REMOVED}
_NO_SPAN = bytes(KEY_BYTES)
_PAGE_ROW = np.dtype([("key", f"V{KEY_BYTES}"), ("position", ">u4"), ("media", "u1")])


@dataclass(frozen=True, slots=True)
class BlocksChanged:
    worker_id: str
    epoch: int
    events: tuple[BlockEvent, ...]


Event = Worker | WorkerLeft | BlocksChanged


def packed(events: Iterable[BlockEvent]) -> bytes:
    """Events as `publish.lua` takes them."""
    parts: list[bytes] = []
    for e in events:
        counts = len(e.keys) // KEY_BYTES, len(e.positions) // POSITION_BYTES
        parts += (_GIVEN.pack(_ACTIONS[e.action], e.medium, *counts), e.span or _NO_SPAN, e.positions, e.keys)
    return b"".join(parts)


def parsed(number: bytes, fields: dict[bytes, bytes]) -> tuple[int, Event]:
    """An entry of the stream, with its number."""
    return int(number.split(b"-")[0]), _event(fields)


def _event(fields: dict[bytes, bytes]) -> Event:
    worker_id, epoch = fields[b"worker"].decode(), int(fields[b"epoch"])
    match fields[b"kind"]:
        case b"blocks":
            entries = (value for name, value in fields.items() if name.isdigit())
            return BlocksChanged(worker_id, epoch, tuple(event for entry in entries for event in _block_events(entry)))
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


def _block_events(entry: bytes) -> Iterator[BlockEvent]:
    action, medium, count = _HEAD.unpack_from(entry)
    if action == _CLEARED:
        yield BlockEvent(Action.CLEARED, 0, b"")
        return
    keys_at = len(entry) - count * KEY_BYTES
    positions, keys = entry[_HEAD.size : keys_at], entry[keys_at:]
    if action == _STORED:
        yield BlockEvent(Action.STORED, medium, keys, positions=positions)
        return
    for gone_from in MEDIA if action == _EVICTED else (medium,):
        yield BlockEvent(Action.REMOVED, gone_from, keys)


def stored_page(page: bytes) -> Iterator[BlockEvent]:
    """One event per medium of a page of blocks: rows of key, position, media."""
    rows = np.frombuffer(page, dtype=_PAGE_ROW)
    for medium in MEDIA:
        held = rows[rows["media"] & (1 << medium) != 0]
        if len(held):
            yield BlockEvent(Action.STORED, medium, held["key"].tobytes(), positions=pack_positions(held["position"]))
