"""The fleet as a proxy sees it, and commands to single workers."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from omni.engine.v1 import engine_pb2
from omni.engine.v1 import worker_service_pb2 as worker_pb
from omni.engine.v1.worker_service_pb2_grpc import WorkerServiceStub
from omni_cli.errors import InvalidOptions, NoAnswer
from omni_cli.kv import ProxyPages
from omni_common.rpc import channel
from omni_common.rpc_errors import from_rpc_error
from omni_common.settings import tls_of_command

ASK_TIMEOUT_S = 10.0
GROUP_LABEL = "omni.group"
ROLES: Mapping[str, engine_pb2.Role] = {
    "prefill": engine_pb2.ROLE_PREFILL,
    "decode": engine_pb2.ROLE_DECODE,
    "both": engine_pb2.ROLE_BOTH,
}


@dataclass(frozen=True, slots=True)
class SeenWorker:
    """One worker on the proxy's page. `saturation` is None where the proxy does not tell it."""

    worker_id: str
    role: str
    group: str
    address: str
    running: int
    waiting: int
    queued_tokens: int
    kv_usage: float
    in_flight: int
    adapters: Mapping[str, bool]
    """LoRA adapters by name, and whether each lies in a slot; those that do come first."""
    weights: Mapping[str, str]
    """Digests by the names that are served, empty where the worker does not tell; none of a model not the proxy's."""
    saturation: float | None
    refusal: str | None


@dataclass(frozen=True, slots=True)
class UnmetWorker:
    """An address in the proxy's settings at which no worker has described itself yet, and why."""

    address: str
    state: str

    @property
    def refusal(self) -> str:
        """The state without its details."""
        return self.state.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Drained:
    """What is left on a worker that takes no new work."""

    is_empty: bool
    running: int
    leases: int


class WorkersClient:
    """Asks one proxy for its workers, and the workers themselves. Raises NoAnswer when one cannot be asked."""

    def __init__(self, url: str) -> None:
        self._pages = ProxyPages(url)

    async def page(self) -> dict[str, Any]:
        """The proxy's page, as it is."""
        return await self._pages.workers()

    async def set_role(self, worker_id: str, role: str) -> str:
        """Change a worker's role; returns the one it had. Raises NoAnswer where the worker refuses."""
        if role not in ROLES:
            raise InvalidOptions(f"{role!r} is no role: choose one of {', '.join(ROLES)}")
        answer = await self._command(worker_id, ASK_TIMEOUT_S, "SetRole", worker_pb.SetRoleRequest(role=ROLES[role]))
        return next((name for name, value in ROLES.items() if value == answer.previous), "unknown")

    async def drain(self, worker_id: str, timeout_s: float, *, resume: bool) -> Drained:
        """Have a worker refuse new work and wait until it is empty or the time is up, or have it take work again."""
        answer = await self._command(worker_id, timeout_s, "Drain", worker_pb.DrainRequest(resume=resume))
        return Drained(answer.drained, answer.running, answer.leases)

    async def _command(self, worker_id: str, timeout_s: float, method: str, request: Any) -> Any:
        address = await self._address(worker_id)
        try:
            async with channel(address, tls=tls_of_command()) as connected:
                stub: Any = WorkerServiceStub(connected)  # type: ignore[no-untyped-call]
                call: Callable[..., Awaitable[Any]] = getattr(stub, method)
                return await call(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise NoAnswer(f"{worker_id} at {address}: {from_rpc_error(error).message}") from None

    async def _address(self, worker_id: str) -> str:
        found = {worker["id"]: worker["address"] for worker in (await self.page())["workers"]}
        if worker_id not in found:
            raise InvalidOptions(f"the proxy knows no worker {worker_id!r} (it knows: {', '.join(found) or 'none'})")
        address: str = found[worker_id]
        return address


def seen_workers(page: Mapping[str, Any]) -> list[SeenWorker]:
    """By role, then by name."""
    workers = [_seen(entry, page.get("model", "")) for entry in page["workers"]]
    return sorted(workers, key=lambda worker: (list(ROLES).index(worker.role), worker.worker_id))


def weights_apart(workers: Sequence[SeenWorker]) -> dict[str, list[list[str]]]:
    """Of which models and adapters workers tell different weights, or some none; who is alike, as lists of ids."""
    holders: dict[str, dict[str, list[str]]] = {}
    for worker in workers:
        for name, digest in worker.weights.items():
            holders.setdefault(name, {}).setdefault(digest, []).append(worker.worker_id)
    return {name: list(alike.values()) for name, alike in sorted(holders.items()) if len(alike) > 1}


def unmet_workers(page: Mapping[str, Any]) -> list[UnmetWorker]:
    """In the order of the proxy's settings."""
    return [UnmetWorker(entry["address"], entry["state"]) for entry in page.get("unreachable", ())]


def _seen(entry: Mapping[str, Any], model: str) -> SeenWorker:
    """`model` is the proxy's own."""
    is_served = entry.get("model") == model
    load, served = entry["load"], entry.get("adapters", ())
    in_slots = frozenset(load.get("adapters", ()))
    return SeenWorker(
        worker_id=entry["id"],
        role=entry["role"],
        group=entry.get("labels", {}).get(GROUP_LABEL, ""),
        address=entry["address"],
        running=load["running"],
        waiting=load["waiting"],
        queued_tokens=load["queued_tokens"],
        kv_usage=load["kv_usage"],
        in_flight=entry["in_flight"]["requests"],
        adapters={name: name in in_slots for name in sorted(served, key=lambda name: (name not in in_slots, name))},
        weights={name or model: entry.get("weights", {}).get(name, "") for name in ("", *served)} if is_served else {},
        saturation=entry.get("saturation"),
        refusal=entry["refusal"],
    )
