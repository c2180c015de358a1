"""The worker's lease with the kvstore: registered while it lives, gone when it leaves."""

import asyncio
import logging
import random
from collections.abc import Callable

import grpc

from omni.engine.v1.engine_pb2 import WorkerInfo
from omni.kvstore.v1.kvstore_service_pb2 import RegisterRequest, RegisterResponse
from omni.kvstore.v1.kvstore_service_pb2_grpc import KvStoreServiceStub
from omni_common.rpc_errors import log_fields
from omni_engine.hosting.admission import Admission
from omni_engine.hosting.settings import EngineRole

log = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 5.0
_LEAVE_TIMEOUT_S = 1.0
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.1, 2.0


class Membership:
    """Keeps one Register stream open for ever. Its loss is logged once per outage and never stops serving."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        describe: Callable[[], WorkerInfo],
        admission: Admission,
        on_snapshot_wanted: Callable[[], None],
    ) -> None:
        """`describe` is asked again when the role of `admission` has changed."""
        self._stub = KvStoreServiceStub(channel)  # type: ignore[no-untyped-call]
        self._describe = describe
        self._admission = admission
        self._on_snapshot_wanted = on_snapshot_wanted
        self._registered = asyncio.Event()
        self._is_outage_logged = False

    @property
    def is_registered(self) -> bool:
        return self._registered.is_set()

    async def registered(self) -> None:
        """Returns once the kvstore has accepted the worker."""
        await self._registered.wait()

    async def run(self) -> None:
        """Register, renew, reconnect. Cancelling it leaves the cluster."""
        backoff_s = _FIRST_BACKOFF_S
        while True:
            try:
                await self._hold()
            except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError, TimeoutError) as error:
                self._note_outage(error)
            backoff_s = _FIRST_BACKOFF_S if self.is_registered else min(2 * backoff_s, _LONGEST_BACKOFF_S)
            self._registered.clear()
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))

    async def _hold(self) -> None:
        """One stream: info first, then a heartbeat every third of the lease, and at once what has changed."""
        call = self._stub.Register()
        try:
            told_role = None
            while True:
                role, draining = self._admission.role, self._admission.is_draining
                info = self._describe() if role != told_role else None
                response = await self._exchange(call, RegisterRequest(info=info, draining=draining))
                told_role = role
                self._note_answer(response)
                await self._pause(response.lease_s / 3, (role, draining))
        except asyncio.CancelledError:
            await self._leave(call)
            raise
        finally:
            call.cancel()

    async def _exchange(
        self, call: "grpc.aio.StreamStreamCall[RegisterRequest, RegisterResponse]", request: RegisterRequest
    ) -> RegisterResponse:
        """One message and its answer. Cancelling lets the exchange end first: gRPC cancels a call together with a
        coroutine that reads from it, and then the worker could not say that it leaves."""
        exchange = asyncio.ensure_future(_converse(call, request))
        try:
            return await asyncio.shield(exchange)
        except asyncio.CancelledError:
            await asyncio.wait({exchange}, timeout=_LEAVE_TIMEOUT_S)
            exchange.cancel()
            raise

    async def _pause(self, seconds: float, told: tuple[EngineRole, bool]) -> None:
        """So long, or until role or draining are not what was told."""
        loop, admission = asyncio.get_running_loop(), self._admission
        until_s = loop.time() + max(0.05, seconds)
        while (remaining_s := until_s - loop.time()) > 0 and (admission.role, admission.is_draining) == told:
            await admission.changed(remaining_s)

    async def _leave(self, call: "grpc.aio.StreamStreamCall[RegisterRequest, RegisterResponse]") -> None:
        if not self.is_registered:
            return
        try:
            async with asyncio.timeout(_LEAVE_TIMEOUT_S):
                await call.write(RegisterRequest(leave=True))
                await call.done_writing()
                while isinstance(await call.read(), RegisterResponse):
                    pass
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError, TimeoutError):
            log.info("left without the kvstore's answer; the lease will end by itself")

    def _note_answer(self, response: RegisterResponse) -> None:
        if not self.is_registered:
            log.info("registered", extra={"epoch": response.epoch, "lease_s": response.lease_s})
        self._registered.set()
        self._is_outage_logged = False
        if response.wants_snapshot:
            self._on_snapshot_wanted()

    def _note_outage(self, error: Exception) -> None:
        if self._is_outage_logged:
            return
        self._is_outage_logged = True
        log.warning("kvstore not reached; serving goes on", extra=log_fields(error))


async def _converse(
    call: "grpc.aio.StreamStreamCall[RegisterRequest, RegisterResponse]", request: RegisterRequest
) -> RegisterResponse:
    async with asyncio.timeout(_ANSWER_TIMEOUT_S):
        await call.write(request)
        response = await call.read()
    if not isinstance(response, RegisterResponse):
        raise TimeoutError("the kvstore ended the stream")
    return response
