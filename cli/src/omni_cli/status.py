"""`omni status`: what runs, and whether it is well."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from omni_cli.plan import Probe
from omni_cli.probes import Health, Phase, fleet_seen, probe, reachable
from omni_cli.state import ProcessRecord, StackState


class Condition(StrEnum):
    """Of a whole stack."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    """It serves, without some of the workers it has or was told of."""
    NOT_HEALTHY = "not healthy"


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """One recorded process and its health."""

    name: str
    pid: int
    phase: Phase
    address: str
    metrics: str | None
    cores: str | None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class StackStatus:
    """One stack. `workers` is the fleet as the proxy sees it; None if it cannot be asked.

    `unreachable` are addresses in the proxy's settings at which no worker has answered yet.
    """

    name: str
    url: str
    is_supervised: bool
    expected_workers: int
    services: tuple[ServiceStatus, ...]
    workers: tuple[dict[str, Any], ...] | None
    unreachable: tuple[dict[str, Any], ...] = ()

    @property
    def condition(self) -> Condition:
        is_ready = bool(self.services) and all(s.phase is Phase.READY for s in self.services)
        if not is_ready or (self.workers is not None and len(self.workers) < self.expected_workers):
            return Condition.NOT_HEALTHY
        return Condition.DEGRADED if self.unreachable or self.idled else Condition.HEALTHY

    @property
    def idled(self) -> tuple[dict[str, Any], ...]:
        """Workers that the proxy sees and gives no work."""
        return tuple(worker for worker in self.workers or () if worker.get("takes_work") is False)

    @property
    def is_healthy(self) -> bool:
        return self.condition is Condition.HEALTHY

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"condition": self.condition, "is_healthy": self.is_healthy}


async def read_status(state: StackState) -> StackStatus:
    """Probe every process of a stack at once."""
    services, seen = await asyncio.gather(
        asyncio.gather(*(_service(record) for record in state.processes)), fleet_seen(state.url)
    )
    supervised = state.supervisor is not None and state.supervisor.process() is not None
    workers, unreachable = (None, ()) if seen is None else (seen.workers, seen.unreachable)
    return StackStatus(state.name, state.url, supervised, state.workers, tuple(services), workers, unreachable)


async def read_all(states: Sequence[StackState]) -> list[StackStatus]:
    return list(await asyncio.gather(*(read_status(state) for state in states)))


async def _service(record: ProcessRecord) -> ServiceStatus:
    is_alive = record.process() is not None
    health = await probe(record.probe, record.address) if is_alive else Health(Phase.DEAD)
    detail = health.detail if health.phase is not Phase.READY else ""
    return ServiceStatus(record.name, record.pid, health.phase, record.address, _metrics(record), record.cores, detail)


def _metrics(record: ProcessRecord) -> str | None:
    """The proxy's are on its own port."""
    if record.probe in (Probe.HTTP_READY, Probe.HTTPS_READY):
        return f"{record.probe}://{reachable(record.address)}/metrics"
    return f"http://127.0.0.1:{record.metrics_port}/metrics" if record.metrics_port else None
