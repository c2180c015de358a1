"""Relay of the engine's block events to the kvstore.

engine.events() -> mirror (hash -> key, always complete) -> pending -> PublishBlocks, one batch per interval
                      |
                      +-- on (re)connection, on demand, or when pending overflowed: a snapshot of the mirror instead
"""

import asyncio
import logging
import random
from collections.abc import Iterator

import grpc

from omni.kv.v1 import kv_pb2
from omni.kvstore.v1 import kvstore_service_pb2 as kvstore
from omni.kvstore.v1.kvstore_service_pb2_grpc import KvStoreServiceStub
from omni_common.blocks import KEY_BYTES
from omni_engine.hosting.identity import Identity
from omni_engine.hosting.mirror import BlockMirror, KeyEvent
from omni_engine.hosting.wire import MEDIA
from omni_engine.ports import Engine

PublishCall = grpc.aio.StreamUnaryCall[kvstore.PublishBlocksRequest, kvstore.PublishBlocksResponse]
log = logging.getLogger(__name__)

_ACTIONS = {
    "stored": kvstore.BLOCK_ACTION_STORED,
    "removed": kvstore.BLOCK_ACTION_REMOVED,
    "cleared": kvstore.BLOCK_ACTION_CLEARED,
}
_MAX_PENDING_EVENTS = 10_000
_KEYS_PER_MESSAGE = 65_536
_WRITE_TIMEOUT_S = 10.0
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.1, 2.0


class BlockRelay:
    """Publishes what the engine caches; never slows the engine and never fails with the kvstore."""

    def __init__(
        self,
        engine: Engine,
        channel: grpc.aio.Channel,
        mirror: BlockMirror,
        identity: Identity,
        interval_s: float,
    ) -> None:
        self._engine = engine
        self._stub = KvStoreServiceStub(channel)  # type: ignore[no-untyped-call]
        self._mirror = mirror
        self._identity = identity
        self._interval_s = interval_s
        self._pending: list[KeyEvent] = []
        self._wants_snapshot = True
        self._wake = asyncio.Event()
        self._sequence = 0
        self._engine_sequence: int | None = None
        self.lost_batches = 0

    def request_snapshot(self) -> None:
        """The kvstore does not have all of this epoch's blocks."""
        self._wants_snapshot = True
        self._wake.set()

    async def run(self) -> None:
        """Relay until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(), name="block-events")
            group.create_task(self._publish_for_ever(), name="block-publisher")

    async def _follow(self) -> None:
        async for batch in self._engine.events():
            if self._engine_sequence is not None and batch.sequence > self._engine_sequence + 1:
                self.lost_batches += batch.sequence - self._engine_sequence - 1
            self._engine_sequence = batch.sequence
            for event in batch.events:
                translated = self._mirror.apply(event)
                if translated is not None:
                    self._add(translated)
            self._wake.set()

    def _add(self, event: KeyEvent) -> None:
        if self._wants_snapshot:
            return
        if len(self._pending) >= _MAX_PENDING_EVENTS:
            self._wants_snapshot = True
            self._pending.clear()
            return
        self._pending.append(event)

    async def _publish_for_ever(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            before = self._sequence
            try:
                await self._publish()
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as error:
                log.debug("block events not published", extra={"error": type(error).__name__})
            self._wants_snapshot = True
            self._pending.clear()
            has_sent = self._sequence > before + 1
            backoff_s = _FIRST_BACKOFF_S if has_sent else min(2 * backoff_s, _LONGEST_BACKOFF_S)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))

    async def _publish(self) -> None:
        """One stream; returns when the kvstore answers it, which it does only to ask for a snapshot."""
        call = self._stub.PublishBlocks()
        answered = asyncio.ensure_future(call.wait_for_connection())
        try:
            async with asyncio.timeout(_WRITE_TIMEOUT_S):
                await answered
            while not call.done():
                for request in self._take():
                    async with asyncio.timeout(_WRITE_TIMEOUT_S):
                        await call.write(request)
                await asyncio.sleep(self._interval_s)
                await self._work_or_end(call)
        finally:
            answered.cancel()
            call.cancel()

    async def _work_or_end(self, call: PublishCall) -> None:
        """Wait for something to send or for the end of the call, whichever comes first."""
        call.add_done_callback(lambda _: self._wake.set())
        while not (self._pending or self._wants_snapshot or call.done()):
            self._wake.clear()
            await self._wake.wait()

    def _take(self) -> Iterator[kvstore.PublishBlocksRequest]:
        if self._wants_snapshot:
            self._wants_snapshot = False
            self._pending.clear()
            yield from self._snapshot()
        elif self._pending:
            events, self._pending = self._pending, []
            yield self._message([_event(e) for e in events])

    def _snapshot(self) -> Iterator[kvstore.PublishBlocksRequest]:
        """The first message replaces, the others add: one message is bounded, the mirror may be larger."""
        size = _KEYS_PER_MESSAGE * KEY_BYTES
        parts = [
            KeyEvent("stored", medium, keys[start : start + size])
            for medium, keys in self._mirror.held()
            for start in range(0, len(keys), size)
        ]
        yield self._message([_event(p) for p in parts[:1]], snapshot=True)
        for part in parts[1:]:
            yield self._message([_event(part)])

    def _message(self, events: list[kvstore.BlockEvent], snapshot: bool = False) -> kvstore.PublishBlocksRequest:
        self._sequence += 1
        return kvstore.PublishBlocksRequest(
            worker_id=self._identity.worker_id,
            epoch=self._identity.epoch,
            sequence=self._sequence,
            snapshot=snapshot,
            events=events,
        )


def _event(event: KeyEvent) -> kvstore.BlockEvent:
    medium = kv_pb2.MEDIUM_UNSPECIFIED if event.medium is None else MEDIA[event.medium]
    return kvstore.BlockEvent(action=_ACTIONS[event.action], medium=medium, block_keys=event.keys)
