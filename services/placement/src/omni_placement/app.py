"""Puts the service together and runs it."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry

from omni_common import telemetry
from omni_common.rpc import Server, run_until_signal
from omni_placement import __version__
from omni_placement.book import LayoutBook, LayoutFiles
from omni_placement.layout import Topology
from omni_placement.metrics import Metrics
from omni_placement.planning import Planner
from omni_placement.rpc import PlacementServicer, servicer
from omni_placement.settings import Settings
from omni_placement.windows import LoadBook

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Placement:
    """A running service."""

    server: Server
    layouts: LayoutBook
    port: int

    async def drain(self) -> None:
        """End the watches and finish what is being published."""
        self.layouts.close()
        await self.layouts.settle()


@asynccontextmanager
async def running(settings: Settings, registry: CollectorRegistry) -> AsyncIterator[Placement]:
    """The service on its port, with the layouts saved earlier and those of the configured models in force.

    Raises:
        InvalidRequest: a configured topology cannot hold its experts.
        Internal: a saved layout cannot be read.
    """
    files = LayoutFiles(settings.state_dir) if settings.state_dir else None
    metrics = Metrics(registry)
    loads = LoadBook(settings.load_windows, settings.max_models)
    layouts = LayoutBook(files.save if files else None, models=settings.max_models, watch_queue=settings.watch_queue)
    layouts.restore(files.load() if files else [])
    planner = Planner(layouts, loads, settings.default_solver)
    for model, shape in settings.models.items():
        published = await planner.ensure(model, Topology(**shape.model_dump()))
        metrics.layout_version.labels(model).set(published.version)
    server = Server([servicer(PlacementServicer(planner, layouts, loads, metrics))], settings.tls)
    port = await server.start(f"{settings.host}:{settings.port}")
    placement = Placement(server, layouts, port)
    try:
        yield placement
    finally:
        await placement.drain()
        await server.stop(0.0)


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT."""
    observed = telemetry.set_up(settings, f"{socket.gethostname()}:{settings.port}", __version__)
    try:
        async with running(settings, observed.registry) as placement:
            address = {"address": f"{settings.host}:{placement.port}", "port": placement.port}
            # Said from the loop, when `run_until_signal` already listens for signals.
            asyncio.get_running_loop().call_soon(partial(log.info, "serving", extra=address))
            await run_until_signal(placement.server, placement.drain, settings.drain_timeout_s)
    finally:
        observed.close()
