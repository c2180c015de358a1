"""Wire edge of KvStoreService."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from omni.kvstore.v1 import kvstore_service_pb2 as pb
from omni.kvstore.v1.kvstore_service_pb2_grpc import KvStoreServiceServicer, add_KvStoreServiceServicer_to_server
from omni_common.errors import DeadlineExceeded, InvalidRequest, NotFound
from omni_common.rpc import Servicer
from omni_kvstore import wire
from omni_kvstore.blocks import Batch
from omni_kvstore.membership import Worker
from omni_kvstore.metrics import Metrics
from omni_kvstore.replica import Replica
from omni_kvstore.watches import Watches

_SILENT_LEASES = 2


class KvStoreServicer(KvStoreServiceServicer):
    """Decodes the messages, calls replica and watches, encodes the answers."""

    def __init__(
        self, replica: Replica, watches: Watches, metrics: Metrics, *, lease_s: float, max_lookup_blocks: int
    ) -> None:
        self._replica, self._watches, self._metrics = replica, watches, metrics
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
            published = await self._replica.publish(batch)
            self._count(batch, published.gap)
            sequence = published.sequence
            if published.gap:
                return pb.PublishBlocksResponse(accepted_sequence=sequence, wants_snapshot=True)
        return pb.PublishBlocksResponse(accepted_sequence=sequence)

    def _count(self, batch: Batch, is_gap: bool) -> None:
        outcome = "gap" if is_gap else "snapshot" if batch.snapshot else "applied"
        self._metrics.batches.labels(outcome).inc()
        if not is_gap:
            counts = Counter[str]()
            for event in batch.events:
                counts[event.action.value] += len(event)
            for action, count in counts.items():
                self._metrics.blocks.labels(action).inc(count)
            if batch.occurred_ms:
                self._metrics.lag_seconds.observe(max(0.0, time.time() - batch.occurred_ms / 1000))

    async def Lookup(self, request: pb.LookupRequest, context: Any) -> pb.LookupResponse:
        model, block_size, keys = wire.lookup_from_wire(request, self._max_lookup_blocks)
        start_s = time.perf_counter()
        matches, degraded = await self._replica.lookup(model, block_size, keys)
        source = "memory" if degraded else "redis"
        self._metrics.lookup_seconds.labels(source).observe(time.perf_counter() - start_s)
        self._metrics.hit_depth.observe(max((match.num_blocks for match in matches), default=0))
        return wire.matches_to_wire(matches, degraded)

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchResponse]:
        version = 0
        interest, resume = wire.watch_from_wire(request)
        async for update in self._watches.updates(interest, resume):
            version += 1
            yield wire.update_to_wire(update, version)

    async def ListWorkers(self, request: pb.ListWorkersRequest, context: Any) -> pb.ListWorkersResponse:
        standings, degraded = await self._replica.standings()
        wanted = [s for s in standings if request.model in ("", s.worker.model)]
        return pb.ListWorkersResponse(workers=map(wire.standing_to_wire, wanted), degraded=degraded)

    async def ListBlocks(self, request: pb.ListBlocksRequest, context: Any) -> AsyncIterator[pb.ListBlocksResponse]:
        if not self._replica.knows(request.worker_id):
            raise NotFound(f"no worker {request.worker_id!r} holds a lease", field="worker_id")
        async for change, degraded in self._replica.blocks_of(request.worker_id):
            yield wire.held_to_wire(change, degraded)


def _registered(request: pb.RegisterRequest, known: Worker | None) -> Worker:
    """The worker a message speaks of: its own info, else that of the stream's earlier messages."""
    if request.HasField("info"):
        worker = wire.worker_from_wire(request.info, request.draining)
        if known and (worker.worker_id, worker.epoch) != (known.worker_id, known.epoch):
            raise InvalidRequest("a stream speaks of one worker and epoch", field="info")
        return worker
    if known is None:
        raise InvalidRequest("the first message must carry info", field="info")
    return replace(known, draining=request.draining)


def servicer(implementation: KvStoreServicer) -> Servicer:
    name = pb.DESCRIPTOR.services_by_name["KvStoreService"].full_name
    return Servicer(implementation, add_KvStoreServiceServicer_to_server, name)
