"""Puts the service together and runs it."""

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry

from omni_common import telemetry
from omni_common.rpc import Server, Servicer, run_until_signal
from omni_placement import __version__
from omni_placement.book import LayoutBook
from omni_placement.files import LayoutFiles, held
from omni_placement.load import LoadBook
from omni_placement.load.book import GroupName
from omni_placement.load.profiles import ProfileFiles
from omni_placement.metrics import Metrics
from omni_placement.periodic import every, stop
from omni_placement.planning import Planner
from omni_placement.rebalancing import Rebalancer
from omni_placement.recovery import Recovery
from omni_placement.reports import Reports
from omni_placement.rollout import Rollout
from omni_placement.rpc import PlacementServicer, servicer
from omni_placement.settings import Settings
from omni_placement.unbroken import Unbroken

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Placement:
    """A running service."""

    server: Server
    parts: "Parts"
    port: int

    async def drain(self) -> None:
        """End the watches and finish what is being published."""
        self.parts.layouts.close()
        self.parts.rollout.close()
        await self.settle()

    async def settle(self) -> None:
        """Wait for what is being published and saved."""
        await self.parts.recovery.settle()
        await self.parts.rollout.settle()
        await self.parts.saving.settle()


class Parts:
    """The parts of the service, as the settings want them. `clock` is Unix time.

    Raises:
        InvalidRequest: a configured topology cannot hold its experts.
        Internal: a saved layout or load cannot be read.
    """

    def __init__(self, settings: Settings, registry: CollectorRegistry, clock: Callable[[], float]) -> None:
        files = LayoutFiles(settings.state_dir) if settings.state_dir else None
        self.profiles = ProfileFiles(settings.state_dir / "load") if settings.state_dir else None
        self.configured = {model: shape.topology for model, shape in settings.models.items()}
        self.metrics = Metrics(registry)
        self.layouts = LayoutBook(
            files,
            clock,
            groups=settings.max_groups,
            history=settings.history,
            watch_queue=settings.watch_queue,
        )
        self.layouts.restore(files.load() if files else [])
        self.reports = Reports(LoadBook(settings.load_rules), self.layouts, clock, settings.forecast.horizon_s)
        self.reports.restore(self.profiles.load() if self.profiles else [])
        self.rollout = Rollout(
            self.layouts,
            time.monotonic,
            settings.round_timeout_s,
            self.configured,
            settings.forget_after_s,
            self.reports.forget,
        )
        self.planner = Planner(self.layouts, self.rollout, self.reports, settings.plan_rules, clock)
        self.recovery = Recovery(self.layouts, self.rollout, self.planner, self.metrics)
        self.saving = Unbroken()
        self.rebalancer = Rebalancer(
            self.layouts, self.rollout, self.reports, self.planner, self.metrics, settings.forecast.max_age_s
        )

    def servicer(self) -> Servicer:
        return servicer(
            PlacementServicer(self.layouts, self.rollout, self.reports, self.planner, self.recovery, self.metrics)
        )

    async def keep_load(self) -> None:
        """Save what is known of every group's load; what was saved of groups forgotten since is deleted."""
        if self.profiles is not None:
            await self.saving.run(self._keep_load(self.profiles))

    async def _keep_load(self, profiles: ProfileFiles) -> None:
        for profile in self.reports.profiles():
            await asyncio.to_thread(profiles.save, profile)
        await asyncio.to_thread(profiles.keep, self.layouts.names())

    async def follow_layouts(self) -> None:
        """Show the layouts in force in the metrics, for ever."""
        async for published in self.layouts.watch("", "", 0):
            self.metrics.layout_version.labels(*published.name).set(published.version)
            if (balancedness := self.reports.balancedness(published.name)) is not None:
                self.metrics.balancedness.labels(*published.name).set(balancedness)


@asynccontextmanager
async def running(
    settings: Settings, registry: CollectorRegistry, clock: Callable[[], float] = time.time
) -> AsyncIterator[Placement]:
    """The service on its port, with what was saved earlier and the layouts of the configured models in force.

    Raises as `Parts`, and `FailedPrecondition` where another service runs on the same `state_dir`.
    """
    with held(settings.state_dir) if settings.state_dir else nullcontext():
        parts = Parts(settings, registry, clock)
        for model, topology in parts.configured.items():
            await parts.planner.ensure(GroupName(model, ""), topology)
        server = Server([parts.servicer()], settings.tls)
        port = await server.start(f"{settings.host}:{settings.port}")
        placement = Placement(server, parts, port)
        tasks = [asyncio.create_task(work) for work in _background(parts, settings)]
        try:
            yield placement
        finally:
            await stop(tasks)
            await placement.drain()
            await server.stop(0.0)
            # Calls that came in while it drained.
            await placement.settle()
            await parts.keep_load()


def _background(parts: Parts, settings: Settings) -> Iterator[Coroutine[Any, Any, None]]:
    yield parts.follow_layouts()
    yield parts.planner.warm_up()
    yield every(settings.round_timeout_s / 4, parts.recovery.sweep)
    yield every(settings.forecast.interval_s, parts.keep_load)
    if settings.rebalance_interval_s:
        yield every(settings.rebalance_interval_s, parts.rebalancer.look_at_all)


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
