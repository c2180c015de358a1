"""vLLM's ZMQ publisher of KV events, followed without holes where that can be had.

SUB     [topic, sequence, payload]               as they happen; lossy
DEALER  ["", first]  ->  ["", topic, sequence, payload]...  ["", "", -1, ""]     what the publisher still keeps
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import NamedTuple

import zmq
import zmq.asyncio

log = logging.getLogger(__name__)

_MAX_QUEUED_BATCHES = 100_000
_REPLAY_TIMEOUT_S = 5.0
_END = (-1).to_bytes(8, "big", signed=True)


class RawBatch(NamedTuple):
    sequence: int
    payload: bytes
    is_replayed: bool = False


class EventStream:
    """Subscribed from construction, so that nothing published later is missed.

    A gap is filled from the publisher's replay socket within `replay_timeout_s`. Where it cannot be, the sequence
    jumps; it also falls back when another publisher took over, which counts from 0 again.
    """

    def __init__(self, endpoint: str, replay_endpoint: str, replay_timeout_s: float = _REPLAY_TIMEOUT_S) -> None:
        self._replay_endpoint = replay_endpoint
        self._replay_timeout_s = replay_timeout_s
        # The publisher counts from 0, so a late start is a gap too.
        self._expected = 0
        self._last_live = -1
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, _MAX_QUEUED_BATCHES)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.connect(endpoint)

    async def __aiter__(self) -> AsyncIterator[RawBatch]:
        while True:
            frames = await self._socket.recv_multipart()
            if len(frames) != 3:
                log.warning("message of %d frames is not a batch of block events", len(frames))
                continue
            batch = RawBatch(int.from_bytes(frames[1], "big"), frames[2])
            async for due in self._due(batch):
                self._expected = due.sequence + 1
                yield due

    def close(self) -> None:
        self._context.destroy(linger=0)

    async def _due(self, batch: RawBatch) -> AsyncIterator[RawBatch]:
        """The batch, after those missing before it; nothing if it was replayed already."""
        if batch.sequence <= self._last_live:
            self._expected = 0
        self._last_live = batch.sequence
        if batch.sequence > self._expected:
            for missed in await self._replay(self._expected):
                yield missed
        if batch.sequence >= self._expected:
            yield batch

    async def _replay(self, first: int) -> list[RawBatch]:
        """What the publisher still has from `first` on, in order. It may drop answers too, so holes are asked again."""
        found: dict[int, bytes] = {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._replay_timeout_s):
                with self._context.socket(zmq.DEALER) as socket:
                    socket.setsockopt(zmq.LINGER, 0)
                    socket.setsockopt(zmq.RCVHWM, 0)
                    socket.connect(self._replay_endpoint)
                    known = -1
                    while known < len(found):
                        known = len(found)
                        await self._ask(socket, first, found)
                        while first in found:
                            first += 1
                        if first > max(found, default=first):
                            break
        return [RawBatch(sequence, found[sequence], is_replayed=True) for sequence in sorted(found)]

    async def _ask(self, socket: zmq.asyncio.Socket, first: int, found: dict[int, bytes]) -> None:
        await socket.send_multipart([b"", first.to_bytes(8, "big")])
        while True:
            *_, sequence, payload = await socket.recv_multipart()
            if sequence == _END:
                return
            found.setdefault(int.from_bytes(sequence, "big"), payload)
