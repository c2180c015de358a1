"""Where workers are learnt from: the kvstore's watch, which also tells their blocks, and addresses in the settings."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from omni.engine.v1 import worker_service_pb2 as worker_pb
from omni.engine.v1 import worker_service_pb2_grpc
from omni.kvstore.v1 import kvstore_service_pb2 as kvstore_pb
from omni.kvstore.v1 import kvstore_service_pb2_grpc
from omni_common.rpc_errors import from_rpc_error, log_fields
from omni_proxy.backoff import Backoff
from omni_proxy.replica import Replica
from omni_proxy.roster import Roster
from omni_proxy.wire import (
    changes_from_wire,
    holder_from_wire,
    is_pool,
    position_from_wire,
    position_to_wire,
    worker_from_wire,
)

log = logging.getLogger(__name__)

_WORKERS_AT_ONCE = 16
"""Workers of one message taken in before other work of the event loop gets its turn."""

Connect = Callable[[str], grpc.aio.Channel]


class KvStoreMembership:
    """Follows the kvstore's workers and their blocks; while it is away, what it told last stays."""

    def __init__(
        self, addresses: Sequence[str], model: str, connect: Connect, roster: Roster, replica: Replica
    ) -> None:
        """Replicas at `addresses` are tried in turn; only blocks of `model` are followed."""
        self._addresses = addresses
        self._model = model
        self._connect = connect
        self._roster = roster
        self._replica = replica
        self._told: set[str] = set()
        self._heard_at: float | None = None
        self.is_connected = False
        self.is_degraded = False

    @property
    def age_s(self) -> float | None:
        """Seconds since the kvstore was last known to be there; None before the first time."""
        if self._heard_at is None:
            return None
        return 0.0 if self.is_connected else asyncio.get_running_loop().time() - self._heard_at

    async def run(self) -> None:
        backoff = Backoff()
        for address in itertools.cycle(self._addresses):
            try:
                async with self._connect(address) as channel:
                    await self._follow(channel, backoff)
            except grpc.aio.AioRpcError as error:
                if backoff.is_first:
                    message = "kvstore unreachable; what it told last stays"
                    log.warning(message, extra={"address": address, **log_fields(error)})
            except ValueError:
                # A message the index refuses would come again after its position; a snapshot leaves it behind.
                log.exception("kvstore told what cannot be; asking for a snapshot", extra={"address": address})
                self._replica.position = None
            self._lost()
            await backoff.wait()

    async def _follow(self, channel: grpc.aio.Channel, backoff: Backoff) -> None:
        stub: Any = kvstore_service_pb2_grpc.KvStoreServiceStub(channel)  # type: ignore[no-untyped-call]
        resume = position_to_wire(self._replica.position)
        is_first = True
        async for message in stub.Watch(kvstore_pb.WatchRequest(blocks=True, model=self._model, resume=resume)):
            if is_first and resume is not None and not message.snapshot:
                self._replica.resumed()
            is_first = False
            await self._apply(message)
            if self._replica.is_current:
                backoff.reset()

    def _lost(self) -> None:
        if self.is_connected:
            self._heard_at = asyncio.get_running_loop().time()
        self.is_connected = False
        self._replica.lost()

    async def _apply(self, message: kvstore_pb.WatchResponse) -> None:
        self.is_connected, self.is_degraded = True, message.degraded
        self._heard_at = asyncio.get_running_loop().time()
        if message.snapshot:
            self._replica.begin_snapshot()
        for number, change in enumerate(message.workers, 1):
            self._apply_worker(change)
            if number % _WORKERS_AT_ONCE == 0:
                await asyncio.sleep(0)
        if message.snapshot:
            self._roster.omitted(self._told - {change.info.worker_id for change in message.workers})
        await self._replica.apply(changes_from_wire(message))
        if message.complete:
            await self._replica.complete_snapshot()
        self._replica.followed(position_from_wire(message), is_degraded=message.degraded)

    def _apply_worker(self, change: kvstore_pb.WorkerChange) -> None:
        info = change.info
        if change.removed:
            self._told.discard(info.worker_id)
            self._replica.leave(info.worker_id)
            self._roster.leave(info.worker_id)
            return
        if info.model == self._model:
            self._replica.join(holder_from_wire(info))
        if not is_pool(info):
            self._told.add(info.worker_id)
            self._roster.join(worker_from_wire(info), is_draining=change.draining)


class StaticMembership:
    """A worker known by address: described until it answers, and again in a while, in case it restarted."""

    def __init__(self, address: str, connect: Connect, roster: Roster, timeout_s: float) -> None:
        self.address = address
        self.is_met = False
        """Once it is, the fleet knows how the worker fares."""
        self.state = "unreachable: no answer yet"
        self._connect = connect
        self._roster = roster
        self._timeout_s = timeout_s

    async def run(self) -> None:
        backoff = Backoff()
        async with self._connect(self.address) as channel:
            stub: Any = worker_service_pb2_grpc.WorkerServiceStub(channel)  # type: ignore[no-untyped-call]
            while True:
                try:
                    answer = await stub.Describe(worker_pb.DescribeRequest(), timeout=self._timeout_s)
                except grpc.aio.AioRpcError as error:
                    if backoff.is_first:
                        message = "worker does not describe itself yet"
                        log.warning(message, extra={"address": self.address, **log_fields(error)})
                    found = from_rpc_error(error)
                    self.state = found.message if found.reason else f"unreachable: {found.message}"
                    await backoff.wait()
                    continue
                backoff.reset()
                if is_pool(answer.info):
                    self.state = "a pool of blocks is not a worker"
                    log.error("a pool of blocks is not a worker; ignored", extra={"address": self.address})
                    return
                # The address in the settings is the one that is known to work from here.
                answer.info.address = self.address
                self._roster.join(worker_from_wire(answer.info))
                self.is_met = True
                await asyncio.sleep(self._timeout_s)
