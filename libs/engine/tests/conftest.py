"""Workers hosted in process: a simulated engine behind real gRPC on a free port."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from omni.engine.v1.worker_service_pb2_grpc import WorkerServiceStub
from omni.prefill.v1.prefill_service_pb2_grpc import PrefillServiceStub
from omni_common.rpc import channel
from omni_engine.hosting.host import WorkerHost
from omni_engine.hosting.settings import WorkerSettings
from omni_engine.sim import SimEngine


class Settings(WorkerSettings):
    service = "decode"


async def _until(condition: Callable[[], object]) -> None:
    """Returns once the condition holds; what it reads has no event to wait for."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.fixture
def until() -> Callable[[Callable[[], object]], Awaitable[None]]:
    return _until


@dataclass(slots=True)
class Hosted:
    """A running worker and a channel to it."""

    engine: SimEngine
    host: WorkerHost
    channel: grpc.aio.Channel
    registry: CollectorRegistry

    @property
    def prefill(self) -> PrefillServiceStub:
        return PrefillServiceStub(self.channel)

    @property
    def worker(self) -> WorkerServiceStub:
        return WorkerServiceStub(self.channel)

    async def idle(self) -> None:
        """Returns once nothing runs and no block is held."""
        await _until(lambda: not (self.engine.stats().kv_usage or self.host.admission.active))


@asynccontextmanager
async def _hosted(**settings: object) -> AsyncIterator[Hosted]:
    parsed = Settings.model_validate({"engine": "sim", **settings})
    engine = SimEngine(parsed.sim, parsed.model_name, adapters=parsed.adapters)
    registry = CollectorRegistry()
    host = WorkerHost(parsed, engine, registry)
    port = await host.start()
    serving = asyncio.create_task(host.serve())
    try:
        async with channel(f"127.0.0.1:{port}") as connected:
            async with asyncio.timeout(10):
                while not host.admission.is_ready:
                    await host.admission.changed(0.1)
            yield Hosted(engine, host, connected, registry)
    finally:
        serving.cancel()
        await asyncio.wait({serving})
        await host.close()


HostWorker = Callable[..., AbstractAsyncContextManager[Hosted]]


@pytest.fixture
def hosted() -> HostWorker:
    return _hosted


@pytest.fixture(scope="session")
def _exporter() -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(_exporter: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    """Spans that ended during the test."""
    _exporter.clear()
    yield _exporter
    _exporter.clear()
