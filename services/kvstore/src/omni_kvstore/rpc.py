"""Wire edge of KvStoreService."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from omni.kvstore.v1 import kvstore_service_pb2 as pb
from omni.kvstore.v1.kvstore_service_pb2_grpc import KvStoreServiceServicer, add_KvStoreServiceServicer_to_server
from omni_common.blocks import KEY_BYTES
from omni_common.errors import DeadlineExceeded, InvalidRequest
from omni_common.rpc import Servicer
from omni_kvstore import wire
from omni_kvstore.membership import Batch, Worker
from omni_kvstore.metrics import Metrics
from omni_kvstore.replica import Replica
from omni_kvstore.store import RedisStore

_SILENT_LEASES = 2


class KvStoreServicer(KvStoreServiceServicer):
    """Decodes the messages, calls replica and store, encodes the answers."""

    def __init__(
        self, replica: Replica, store: RedisStore, metrics: Metrics, *, lease_s: float, max_lookup_blocks: int
    ) -> None:
        self._replica, self._store, self._metrics = replica, store, metrics
        self._lease_s, self._max_lookup_blocks = lease_s, max_lookup_blocks

    async def Register(
        self, requests: AsyncIterator[pb.RegisterRequest], context: Any
    ) -> AsyncIterator[pb.RegisterResponse]:
        worker: Worker | None = None
        while (request := await self._next(requests)) is not None:
            worker = _registered(request, worker)
            if request.leave:
                await self._replica.leave(worker.worker_id, worker.epoch)
                return
            renewal = await self._replica.renew(worker)
            yield pb.RegisterResponse(epoch=renewal.epoch, lease_s=self._lease_s, wants_snapshot=renewal.wants_snapshot)

    async def _next(self, requests: AsyncIterator[pb.RegisterRequest]) -> pb.RegisterRequest | None:
        """The next heartbeat; None at the stream's end."""
        silence_s = _SILENT_LEASES * self._lease_s
        try:
            async with asyncio.timeout(silence_s):
                return await anext(requests, None)
        except TimeoutError:
            raise DeadlineExceeded(f"no heartbeat for {silence_s:.1f} s", reason="silent") from None

    async def PublishBlocks(
        self, requests: AsyncIterator[pb.PublishBlocksRequest], context: Any
    ) -> pb.PublishBlocksResponse:
        sequence = 0
        async for request in requests:
            batch = wire.batch_from_wire(request)
            published = await self._store.publish(batch)
            self._count(batch, published.gap)
            sequence = published.sequence
            if published.gap:
                return pb.PublishBlocksResponse(accepted_sequence=sequence, wants_snapshot=True)
        return pb.PublishBlocksResponse(accepted_sequence=sequence)

    def _count(self, batch: Batch, is_gap: bool) -> None:
        outcome = "gap" if is_gap else "snapshot" if batch.snapshot else "applied"
        self._metrics.batches.labels(outcome).inc()
        if not is_gap:
            for event in batch.events:
                self._metrics.blocks.labels(event.action.value).inc(len(event.keys) // KEY_BYTES)

    async def Lookup(self, request: pb.LookupRequest, context: Any) -> pb.LookupResponse:
        keys = wire.checked_keys(request.block_keys, "block_keys", self._max_lookup_blocks)
        start_s = time.perf_counter()
        matches = await self._store.lookup(request.model, request.block_size, keys)
        self._metrics.lookup_seconds.observe(time.perf_counter() - start_s)
        return wire.matches_to_wire(matches)

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchResponse]:
        version = 0
        async for update in self._replica.updates(request.blocks):
            version += 1
            yield wire.update_to_wire(update, version)


def _registered(request: pb.RegisterRequest, known: Worker | None) -> Worker:
    """The worker a message speaks of: its own info, else that of the stream's earlier messages."""
    if request.HasField("info"):
        worker = wire.worker_from_wire(request.info, request.draining)
        if known and (worker.worker_id, worker.epoch) != (known.worker_id, known.epoch):
            raise InvalidRequest("a stream speaks of one worker and epoch", field="info")
        return worker
    if known is None:
        raise InvalidRequest("the first message must carry info", field="info")
    return Worker(known.worker_id, known.epoch, known.model, known.block_size, known.info, request.draining)


def servicer(implementation: KvStoreServicer) -> Servicer:
    name = pb.DESCRIPTOR.services_by_name["KvStoreService"].full_name
    return Servicer(implementation, add_KvStoreServiceServicer_to_server, name)
