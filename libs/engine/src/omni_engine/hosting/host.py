"""A worker process: one engine behind the services of both legs, registered with the kvstore."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import grpc
from prometheus_client import CollectorRegistry

from omni.decode.v1.decode_service_pb2_grpc import add_DecodeServiceServicer_to_server
from omni.engine.v1.worker_service_pb2_grpc import add_WorkerServiceServicer_to_server
from omni.prefill.v1.prefill_service_pb2_grpc import add_PrefillServiceServicer_to_server
from omni_common.errors import OmniError
from omni_common.rpc import Server, Servicer, channel, run_until_signal
from omni_common.telemetry import set_up
from omni_engine.hosting.accounts import Accounts
from omni_engine.hosting.admission import Admission
from omni_engine.hosting.background import Background
from omni_engine.hosting.engines import ENGINES
from omni_engine.hosting.events import BlockRelay
from omni_engine.hosting.identity import Identity
from omni_engine.hosting.kernels import KernelUsage
from omni_engine.hosting.membership import Membership
from omni_engine.hosting.metrics import (
    BlocksCollector,
    KernelsCollector,
    LoadCollector,
    PlacementCollector,
    WorkerMetrics,
)
from omni_engine.hosting.mirror import BlockMirror
from omni_engine.hosting.placement import IDEMPOTENT, PlacementClient
from omni_engine.hosting.prefill import PrefillServicer
from omni_engine.hosting.publisher import BlockPublisher
from omni_engine.hosting.session import DecodeHost, DecodeServicer, SessionLimits
from omni_engine.hosting.settings import WorkerSettings
from omni_engine.hosting.worker import Worker, WorkerServicer
from omni_engine.ports import Engine

log = logging.getLogger(__name__)


class WorkerHost:
    """Owns the engine and everything around it. Use `start`, `serve` in a task, then `drain` and `close`."""

    def __init__(self, settings: WorkerSettings, engine: Engine, registry: CollectorRegistry) -> None:
        self._settings = settings
        self._engine = engine
        self._background = Background()
        self.admission = Admission(settings.model_name, settings.role)
        self.accounts = Accounts()
        self.identity = Identity(time.time_ns() // 1_000_000, settings.published_labels)
        self.worker = Worker(engine, self.admission, self.accounts, self.identity)
        self.relay: BlockRelay | None = None
        self.placement: PlacementClient | None = None
        self._kernels = KernelUsage(engine)
        self._metrics = WorkerMetrics(registry)
        registry.register(LoadCollector(self.worker.stats, lambda: self.admission.refused))
        registry.register(BlocksCollector(lambda: self.relay.report() if self.relay else None))
        registry.register(PlacementCollector(lambda: self.placement.report() if self.placement else None))
        registry.register(KernelsCollector(lambda: self._kernels.calls))
        self.server = Server(self._servicers(), settings.tls)

    async def start(self) -> int:
        """Accept connections, health NOT_SERVING; returns the port."""
        settings = self._settings
        port = await self.server.start(f"{settings.host}:{settings.port}", serving=False)
        self.identity.bind(settings, port)
        log.info("listening", extra={"address": self.identity.address, "worker_id": self.identity.worker_id})
        return port

    async def serve(self) -> str:
        """Load the engine and take work; returns why the engine died. Raises what `Engine.start` raises."""
        started_s = time.monotonic()
        await self._engine.start()
        info = self._engine.info
        self.admission.open(info.max_num_seqs + self._settings.max_queued, info.adapters)
        await self.server.set_serving(True)
        log.info(
            "serving",
            extra={
                "address": self.identity.address,
                "worker_id": self.identity.worker_id,
                "role": self.admission.role,
                "model": info.model,
                "engine": f"{info.engine} {info.engine_version}",
                "load_s": round(time.monotonic() - started_s, 2),
            },
        )
        if info.adapters:
            log.info("adapters", extra={"names": list(info.adapters), "load_ms": round(info.adapter_load_ms, 2)})
        try:
            return await self._live()
        finally:
            self.admission.close()

    async def drain(self) -> None:
        """Refuse new work and let what runs finish, within the time the settings give."""
        drained = await self.worker.drain(self._settings.drain_timeout_s)
        log.info("drained" if drained else "drain time is up", extra={"running": self.admission.active})

    async def close(self) -> None:
        """Stop the server and the engine."""
        await self.server.stop(0.5)
        await self._background.close()
        await self._engine.close()

    async def _live(self) -> str:
        """Until the engine dies: membership, block events and the placement of experts, each where configured."""
        async with self._in_cluster() as work, asyncio.TaskGroup() as group:
            tasks = [group.create_task(part) for part in (*work, self._kernels.run())]
            reason = await self._engine.wait_dead()
            for task in tasks:
                task.cancel()
        return reason

    @contextlib.asynccontextmanager
    async def _in_cluster(self) -> AsyncIterator[list[Coroutine[Any, Any, None]]]:
        """What is to run while the engine lives, over open channels."""
        settings, work = self._settings, list[Coroutine[Any, Any, None]]()
        async with contextlib.AsyncExitStack() as channels:
            if settings.kvstore:
                kvstore = await channels.enter_async_context(channel(settings.kvstore, tls=settings.tls))
                relay = self.relay = self._relay(kvstore)
                membership = Membership(kvstore, self.worker.describe, self.admission, relay.request_snapshot)
                work += [membership.run(), relay.run(membership.registered)]
            if settings.placement and self._engine.expert_layout() is not None:
                to_placement = channel(settings.placement, tls=settings.tls, idempotent=IDEMPOTENT)
                placement = await channels.enter_async_context(to_placement)
                self.placement = PlacementClient(placement, self._engine, self.admission, self.identity, settings)
                work.append(self.placement.run())
            elif settings.placement:
                log.info("experts stay where they are: the engine has no expert-parallel ranks")
            yield work

    def _relay(self, kvstore: grpc.aio.Channel) -> BlockRelay:
        info, identity, settings = self._engine.info, self.identity, self._settings
        mirror = BlockMirror(info.model, info.block_size, settings.max_mirrored_blocks, info.num_block_groups)
        publisher = BlockPublisher(
            kvstore, identity.worker_id, identity.epoch, mirror.pages, settings.events_interval_s
        )
        return BlockRelay(self._engine, mirror, publisher)

    def _mirror(self) -> BlockMirror | None:
        return self.relay.mirror if self.relay else None

    def _servicers(self) -> list[Servicer]:
        """Both legs are served whatever the role, which may change; admission refuses the other leg."""
        settings, admission, accounts = self._settings, self.admission, self.accounts
        limits = SessionLimits(settings.frame_window, settings.max_pending_tokens, settings.submit_timeout_s)
        host = DecodeHost(self._engine, admission, accounts, self._background, self._metrics, self.identity, limits)
        decode = DecodeServicer(host)
        prefill = PrefillServicer(self._engine, admission, accounts, self._background, self._metrics, self.identity)
        worker = WorkerServicer(self.worker, admission, settings.drain_timeout_s, self._mirror)
        return [
            Servicer(prefill, add_PrefillServiceServicer_to_server, "omni.prefill.v1.PrefillService"),
            Servicer(decode, add_DecodeServiceServicer_to_server, "omni.decode.v1.DecodeService"),
            Servicer(worker, add_WorkerServiceServicer_to_server, "omni.engine.v1.WorkerService"),
        ]


async def run_worker(settings: WorkerSettings, version: str) -> int:
    """Serve until a signal; returns the exit code, 1 when the engine could not start or died on its own."""
    telemetry = set_up(settings, settings.name_at(settings.port), version)
    try:
        host = WorkerHost(settings, ENGINES[settings.engine](settings), telemetry.registry)
        await host.start()
    except (OmniError, OSError) as error:
        log.error("cannot start", extra={"error": str(error)})
        telemetry.close()
        return 1
    try:
        return await _until_over(host, settings.drain_timeout_s)
    finally:
        await host.close()
        telemetry.close()


async def _until_over(host: WorkerHost, drain_timeout_s: float) -> int:
    serving = asyncio.create_task(host.serve(), name="serve")
    signalled = asyncio.create_task(run_until_signal(host.server, host.drain, drain_timeout_s), name="signals")
    try:
        await asyncio.wait({serving, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            return 0
        log.error("engine gone", extra={"reason": _why(serving)})
        return 1
    finally:
        for task in (serving, signalled):
            task.cancel()
        await asyncio.wait({serving, signalled})


def _why(serving: "asyncio.Task[str]") -> str:
    error = serving.exception()
    return serving.result() if error is None else f"{type(error).__name__}: {error}"
