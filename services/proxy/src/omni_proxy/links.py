"""The connections to one worker: its load stream, its decode session, its prefill calls.

A worker may change its role. Both ports live as long as the link; the member shows those of the legs it takes.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import grpc

from omni.engine.v1 import worker_service_pb2 as worker_pb
from omni.engine.v1 import worker_service_pb2_grpc
from omni.prefill.v1 import prefill_service_pb2 as prefill_pb
from omni.prefill.v1 import prefill_service_pb2_grpc
from omni_common.errors import Unavailable
from omni_common.rpc_errors import from_rpc_error, log_fields
from omni_proxy.backoff import Backoff
from omni_proxy.health import Health, HealthSettings
from omni_proxy.metrics import Metrics
from omni_proxy.ports import PrefillAnswer, PrefillOrder
from omni_proxy.sessions import DecodeSession
from omni_proxy.stalls import TICK_S, StallWatch
from omni_proxy.wire import load_from_wire, prefill_from_wire, prefill_to_wire, role_from_wire
from omni_proxy.worker import Load, Member, Role, Worker

log = logging.getLogger(__name__)

_RELEASE_TIMEOUT_S = 5.0


def is_own_cancel() -> bool:
    """The current task is being cancelled, rather than the thing it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class PrefillClient:
    """The `PrefillPort` of one worker."""

    def __init__(self, channel: grpc.aio.Channel, watch: StallWatch) -> None:
        self._watch = watch
        self._stub: Any = prefill_service_pb2_grpc.PrefillServiceStub(channel)  # type: ignore[no-untyped-call]
        self._releases: set[asyncio.Task[None]] = set()
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_silent(self) -> bool:
        return self._watch.is_silent

    async def wait_idle(self) -> None:
        """Until no prefill runs."""
        await self._idle.wait()

    async def prefill(self, order: PrefillOrder, timeout_s: float, headers: Mapping[str, str]) -> PrefillAnswer:
        self._calls += 1
        self._idle.clear()
        try:
            metadata = tuple(headers.items())
            answer = await self._stub.Prefill(prefill_to_wire(order), timeout=timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self.release(order.request_id)
            raise from_rpc_error(error) from None
        except asyncio.CancelledError:
            if is_own_cancel():
                # The answer may have left already: the lease is ended by the request's name, its own is not known.
                self.release(order.request_id)
                raise
            # grpc reports a channel that was closed under the call as a cancellation of the caller.
            raise Unavailable("the connection to the prefill worker was closed", reason="closed") from None
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()
        return prefill_from_wire(answer)

    def release(self, lease_id: str) -> None:
        task = asyncio.get_running_loop().create_task(self._release(lease_id))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def close(self) -> None:
        """Let running releases end; each is bounded."""
        await asyncio.gather(*self._releases)

    async def _release(self, lease_id: str) -> None:
        try:
            await self._stub.ReleaseKv(prefill_pb.ReleaseKvRequest(lease_id=lease_id), timeout=_RELEASE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            # The lease ends by itself; only the time until then is lost.
            log.info("lease not released early", extra={"code": error.code().name})


class WorkerLink:
    """Owns a worker's channel and streams while `run` runs, and writes its `member`'s state."""

    def __init__(
        self,
        worker: Worker,
        channel: grpc.aio.Channel,
        proxy_id: str,
        connect_timeout_s: float,
        stats_interval_ms: int,
        metrics: Metrics,
        on_change: Callable[[], None],
        health: Health | None = None,
    ) -> None:
        self._channel = channel
        self._health = health or Health(HealthSettings.model_validate({}))
        self._watch = StallWatch(lambda: self._health.settings)
        self._stats: Any = worker_service_pb2_grpc.WorkerServiceStub(channel)  # type: ignore[no-untyped-call]
        self._request = worker_pb.WatchStatsRequest(min_interval_ms=stats_interval_ms, proxy_id=proxy_id)
        self._on_change = on_change
        self._session = DecodeSession(channel, proxy_id, connect_timeout_s, metrics, on_change, self._watch)
        self._prefill = PrefillClient(channel, self._watch)
        self._has_decoded = asyncio.Event()
        self._tells_role = False
        self.member = Member(worker, None, None)
        self._show_ports(worker.role)

    def announced(self, worker: Worker) -> None:
        """The same epoch, told again. What the worker itself says of its role counts for more."""
        role = self.member.worker.role if self._tells_role else worker.role
        self._set_worker(replace(worker, role=role))

    async def run(self) -> None:
        """Until cancelled; then the channel is closed and every sequence on the session has ended."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch_load())
                tasks.create_task(self._keep_session())
                tasks.create_task(self._look_after())
        finally:
            await self._prefill.close()
            await self._channel.close(None)

    async def wait_idle(self) -> None:
        """Until nothing of this proxy runs on the worker."""
        await self._prefill.wait_idle()
        await self._session.wait_idle()

    async def _keep_session(self) -> None:
        """From the first time the worker decodes; the session stays when it does no more, for what runs on it."""
        await self._has_decoded.wait()
        await self._session.run()

    async def _look_after(self) -> None:
        """Sequences do not wait on a worker that has gone quiet; one that is out is asked before it returns."""
        health, worker_id, since_probe_s = self._health, self.member.worker.id, 0.0
        now = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(TICK_S)
            if self._watch.tick(self._session.is_owed, self.member.load.step_ms / 1e3):
                log.warning("worker has gone quiet", extra={"worker": worker_id, "silent_s": self._watch.silent_s})
                health.silence(worker_id, now())
                self._session.abandon()
            since_probe_s += TICK_S
            if since_probe_s >= health.settings.probe_interval_s and health.is_due(worker_id, now()):
                since_probe_s = 0.0
                health.probed(worker_id, await self._answers(), now())

    async def _answers(self) -> bool:
        try:
            timeout_s = self._health.settings.probe_interval_s
            await self._stats.Describe(worker_pb.DescribeRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError:
            return False
        return True

    async def _watch_load(self) -> None:
        backoff = Backoff()
        while True:
            try:
                async for message in self._stats.WatchStats(self._request):
                    backoff.reset()
                    self._told(message)
            except grpc.aio.AioRpcError as error:
                if backoff.is_first:
                    log.warning("worker unreachable", extra={"worker": self.member.worker.id, **log_fields(error)})
            self._set_unreachable()
            await backoff.wait()

    def _told(self, message: worker_pb.WatchStatsResponse) -> None:
        worker = self.member.worker
        if message.epoch > worker.epoch:
            # A later process answers at the address, maybe one that still loads; membership tells when it takes work.
            self._set_unreachable()
            return
        self._watch.reported()
        if (role := role_from_wire(message.role)) is not None:
            self._tells_role = True
            if role is not worker.role:
                self._set_worker(replace(worker, role=role))
        self._set_load(load_from_wire(message))

    def _set_worker(self, worker: Worker) -> None:
        known = self.member.worker
        if worker == known:
            return
        self.member.worker = worker
        if worker.role is not known.role:
            log.info("worker changed its role", extra={"worker": worker.id, "role": worker.role, "was": known.role})
            self._show_ports(worker.role)
        self._on_change()

    def _show_ports(self, role: Role) -> None:
        self.member.prefill = None if role is Role.DECODE else self._prefill
        self.member.decode = None if role is Role.PREFILL else self._session
        if self.member.decode is not None:
            self._has_decoded.set()

    def _set_load(self, load: Load) -> None:
        member = self.member
        has_changed = not member.is_reachable or member.load.draining != load.draining
        member.load, member.is_reachable = load, True
        if has_changed:
            self._on_change()

    def _set_unreachable(self) -> None:
        self._tells_role = False
        if self.member.is_reachable:
            self.member.is_reachable = False
            self._on_change()
