"""Asking a process whether it is ready."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from omni_cli.access import http_options, tls_failure
from omni_cli.plan import Probe
from omni_common.rpc import channel
from omni_common.rpc_errors import handshake_failure
from omni_common.settings import tls_of_command

PROBE_TIMEOUT_S = 2.0


class Phase(StrEnum):
    """How far a process is."""

    STARTING = "starting"  # does not answer
    LOADING = "loading"  # answers that it is not ready
    READY = "ready"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Health:
    """A phase, and what the process said about it."""

    phase: Phase
    detail: str = ""


async def grpc_health(address: str) -> Health:
    """The standard health service's word for the whole server."""
    async with channel(address, tls=tls_of_command()) as connected:
        stub = health_pb2_grpc.HealthStub(connected)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=PROBE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            answers = error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            return Health(Phase.LOADING if answers else Phase.STARTING, handshake_failure(error))
    is_serving = answer.status == health_pb2.HealthCheckResponse.SERVING
    return Health(Phase.READY if is_serving else Phase.LOADING)


async def http_ready(scheme: str, address: str) -> Health:
    """The proxy's /ready."""
    try:
        async with httpx.AsyncClient(timeout=PROBE_TIMEOUT_S, **http_options()) as client:
            response = await client.get(f"{scheme}://{address}/ready")
    except httpx.HTTPError as error:
        return Health(Phase.STARTING, tls_failure(error))
    return Health(Phase.READY if response.status_code == 200 else Phase.LOADING, response.text[:300])


PROBES: Mapping[str, Callable[[str], Awaitable[Health]]] = {
    Probe.GRPC_HEALTH: grpc_health,
    Probe.HTTP_READY: partial(http_ready, "http"),
    Probe.HTTPS_READY: partial(http_ready, "https"),
}


async def probe(kind: str, address: str) -> Health:
    """One probe, bounded in time."""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S + 1):
            return await PROBES[kind](reachable(address))
    except TimeoutError:
        return Health(Phase.STARTING)


def reachable(address: str) -> str:
    """An address a client on this machine can use, for one that listens on every interface."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in ("0.0.0.0", "::", "") else address


@dataclass(frozen=True, slots=True)
class SeenFleet:
    """What a proxy says of its workers: those it knows, and addresses at which none has answered yet."""

    workers: tuple[dict[str, Any], ...]
    unreachable: tuple[dict[str, Any], ...]


async def fleet_seen(url: str) -> SeenFleet | None:
    """The fleet as the proxy sees it (GET /workers); None if it cannot be asked."""
    try:
        async with httpx.AsyncClient(timeout=PROBE_TIMEOUT_S, **http_options()) as client:
            response = await client.get(f"{url}/workers")
            response.raise_for_status()
            content = response.json()
        return SeenFleet(tuple(content["workers"]), tuple(content.get("unreachable", ())))
    except (httpx.HTTPError, ValueError, TypeError, LookupError):
        return None
