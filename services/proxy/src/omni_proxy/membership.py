"""Where workers are learnt from: the kvstore's watch, and addresses in the settings."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc

from omni.engine.v1 import worker_service_pb2 as worker_pb
from omni.engine.v1 import worker_service_pb2_grpc
from omni.kvstore.v1 import kvstore_service_pb2 as kvstore_pb
from omni.kvstore.v1 import kvstore_service_pb2_grpc
from omni_proxy.backoff import Backoff
from omni_proxy.roster import Roster
from omni_proxy.wire import worker_from_wire

log = logging.getLogger(__name__)

Connect = Callable[[str], grpc.aio.Channel]


class KvStoreMembership:
    """Follows the kvstore's list of workers; while the kvstore is away the last list stays."""

    def __init__(self, address: str, connect: Connect, roster: Roster) -> None:
        self._address = address
        self._connect = connect
        self._roster = roster
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
        async with self._connect(self._address) as channel:
            stub: Any = kvstore_service_pb2_grpc.KvStoreServiceStub(channel)  # type: ignore[no-untyped-call]
            while True:
                try:
                    async for message in stub.Watch(kvstore_pb.WatchRequest(blocks=False)):
                        backoff.reset()
                        self._apply(message)
                except grpc.aio.AioRpcError as error:
                    if backoff.is_first:
                        log.warning("kvstore unreachable; the last list stays", extra={"code": error.code().name})
                self._lost()
                await backoff.wait()

    def _lost(self) -> None:
        if self.is_connected:
            self._heard_at = asyncio.get_running_loop().time()
        self.is_connected = False

    def _apply(self, message: kvstore_pb.WatchResponse) -> None:
        self.is_connected, self.is_degraded = True, message.degraded
        self._heard_at = asyncio.get_running_loop().time()
        for change in message.workers:
            if change.removed:
                self._roster.leave(change.info.worker_id)
            else:
                self._roster.join(worker_from_wire(change.info), is_draining=change.draining)
        if message.snapshot:
            self._roster.keep_only({c.info.worker_id for c in message.workers if not c.removed})


class StaticMembership:
    """A worker known by address: described until it answers, and again in a while, in case it restarted."""

    def __init__(self, address: str, connect: Connect, roster: Roster, timeout_s: float) -> None:
        self._address = address
        self._connect = connect
        self._roster = roster
        self._timeout_s = timeout_s

    async def run(self) -> None:
        backoff = Backoff()
        async with self._connect(self._address) as channel:
            stub: Any = worker_service_pb2_grpc.WorkerServiceStub(channel)  # type: ignore[no-untyped-call]
            while True:
                try:
                    answer = await stub.Describe(worker_pb.DescribeRequest(), timeout=self._timeout_s)
                except grpc.aio.AioRpcError as error:
                    if backoff.is_first:
                        message = "worker does not describe itself yet"
                        log.warning(message, extra={"address": self._address, "code": error.code().name})
                    await backoff.wait()
                    continue
                backoff.reset()
                # The address in the settings is the one that is known to work from here.
                answer.info.address = self._address
                self._roster.join(worker_from_wire(answer.info))
                await asyncio.sleep(self._timeout_s)
