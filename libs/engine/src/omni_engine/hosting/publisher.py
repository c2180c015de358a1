"""The stream of one member's blocks to the kvstore: a snapshot, then changes, numbered per epoch.

add / clear -> pending -> one batch of messages per interval -> PublishBlocks
                  |
                  +-- on (re)connection, on demand, or when pending overflowed: everything held instead
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence

import grpc

from omni.kvstore.v1 import kvstore_service_pb2 as kvstore
from omni.kvstore.v1.kvstore_service_pb2_grpc import KvStoreServiceStub
from omni_engine.hosting.mirror import Block, Change
from omni_engine.hosting.pending import Pending, stored_events
from omni_engine.ports import Medium

PublishCall = grpc.aio.StreamUnaryCall[kvstore.PublishBlocksRequest, kvstore.PublishBlocksResponse]
Pages = Callable[[int], Iterator[tuple[Medium, list[Block]]]]
log = logging.getLogger(__name__)

MAX_PENDING_BLOCKS = 262_144
# Building one message must not hold up the event loop that also carries tokens.
BLOCKS_PER_MESSAGE = 4096
_WRITE_TIMEOUT_S = 10.0
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.1, 2.0
_STEADY_S = 5.0
_OUTAGES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


class BlockPublisher:
    """Keeps the kvstore's picture of one member true; never fails with the kvstore.

    `pages` yields all that the member holds, in pages of a given size; it is read piece by piece, with changes added
    in between, and these are sent after it.
    """

    def __init__(self, channel: grpc.aio.Channel, worker_id: str, epoch: int, pages: Pages, interval_s: float) -> None:
        self._stub = KvStoreServiceStub(channel)  # type: ignore[no-untyped-call]
        self._worker_id = worker_id
        self._epoch = epoch
        self._pages = pages
        self._interval_s = interval_s
        self._pending = Pending()
        self._wants_snapshot = True
        self._wake = asyncio.Event()
        self._sequence = 0
        self._refusal = ""
        self.snapshots = 0

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def add(self, changes: Sequence[Change], occurred_unix_ms: int) -> None:
        """Blocks came or left. Where a snapshot is due anyway it will tell."""
        if self._wants_snapshot or not changes:
            return
        self._pending.add(changes, occurred_unix_ms)
        if len(self._pending) > MAX_PENDING_BLOCKS:
            self.request_snapshot()
        self._wake.set()

    def clear(self, occurred_unix_ms: int) -> None:
        """Nothing is held any more."""
        if not self._wants_snapshot:
            self._pending.add_clearing(occurred_unix_ms)
            self._wake.set()

    def request_snapshot(self) -> None:
        """The kvstore does not have all of this epoch's blocks."""
        self._wants_snapshot = True
        self._pending.reset()
        self._wake.set()

    async def run(self, registered: Callable[[], Awaitable[None]]) -> None:
        """Publish until cancelled, whenever `registered` says that the kvstore knows the member."""
        loop, backoff_s = asyncio.get_running_loop(), _FIRST_BACKOFF_S
        while True:
            await registered()
            started_s = loop.time()
            try:
                await self._publish()
            except grpc.aio.AioRpcError as error:
                self._note(error)
            except (grpc.aio.UsageError, asyncio.InvalidStateError, TimeoutError) as error:
                log.debug("block events not published", extra={"error": type(error).__name__})
            self.request_snapshot()
            if loop.time() - started_s > _STEADY_S:
                backoff_s = _FIRST_BACKOFF_S
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)

    async def _publish(self) -> None:
        """One stream; returns when the kvstore answers it, which it does only to ask for a snapshot."""
        call = self._stub.PublishBlocks()
        try:
            async with asyncio.timeout(_WRITE_TIMEOUT_S):
                await call.wait_for_connection()
            call.add_done_callback(lambda _: self._wake.set())
            try:
                while not call.done():
                    await self._send(call)
                    await asyncio.sleep(self._interval_s)
                    await self._work_or_end(call)
            except asyncio.InvalidStateError:
                if not call.done():
                    raise
            # The status says why it ended, which a failed write does not.
            await call
            self._refusal = ""
        finally:
            call.cancel()

    async def _work_or_end(self, call: PublishCall) -> None:
        """Wait for something to send or for the end of the call, whichever comes first."""
        while not (self._pending or self._wants_snapshot or call.done()):
            self._wake.clear()
            await self._wake.wait()

    async def _send(self, call: PublishCall) -> None:
        if self._wants_snapshot:
            await self._send_snapshot(call)
        occurred_unix_ms = self._pending.occurred_unix_ms
        for events in self._pending.take(BLOCKS_PER_MESSAGE):
            await self._write(call, events, occurred_unix_ms=occurred_unix_ms)

    async def _send_snapshot(self, call: PublishCall) -> None:
        """The first message replaces, the others add: one message is bounded, what is held may be larger."""
        self._wants_snapshot = False
        self._pending.reset()
        is_first = True
        for medium, blocks in self._pages(BLOCKS_PER_MESSAGE):
            await self._write(call, stored_events(medium, blocks), snapshot=is_first)
            is_first = False
        if is_first:
            await self._write(call, [], snapshot=True)
        self.snapshots += 1

    async def _write(
        self, call: PublishCall, events: list[kvstore.BlockEvent], snapshot: bool = False, occurred_unix_ms: int = 0
    ) -> None:
        self._sequence += 1
        request = kvstore.PublishBlocksRequest(
            worker_id=self._worker_id,
            epoch=self._epoch,
            sequence=self._sequence,
            snapshot=snapshot,
            events=events,
            occurred_unix_ms=occurred_unix_ms,
        )
        async with asyncio.timeout(_WRITE_TIMEOUT_S):
            await call.write(request)
        # A write that finds room returns at once.
        await asyncio.sleep(0)

    def _note(self, error: grpc.aio.AioRpcError) -> None:
        """An outage is membership's to tell; a refusal is told once, with its reason."""
        refusal = f"{error.code().name}: {error.details()}"
        if error.code() in _OUTAGES:
            log.debug("block events not published", extra={"error": refusal})
        elif refusal != self._refusal:
            self._refusal = refusal
            log.warning("kvstore refuses block events", extra={"code": error.code().name, "detail": error.details()})
