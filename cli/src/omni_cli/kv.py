"""Asking kvstore, workers and proxy what they know of KV blocks."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import grpc
import httpx

from omni.engine.v1 import engine_pb2
from omni.engine.v1 import worker_service_pb2 as worker_pb
from omni.engine.v1.worker_service_pb2_grpc import WorkerServiceStub
from omni.kv.v1 import kv_pb2
from omni.kvstore.v1 import kvstore_service_pb2 as kvstore_pb
from omni.kvstore.v1.kvstore_service_pb2_grpc import KvStoreServiceStub
from omni_cli.access import base_url, http_options, why
from omni_cli.errors import NoAnswer
from omni_cli.probes import reachable
from omni_common import rpc_errors
from omni_common.blocks import KEY_BYTES
from omni_common.rpc import channel
from omni_common.settings import tls_of_command

ASK_TIMEOUT_S = 30.0
Held = set[tuple[int, bytes]]
"""(medium, block key) of everything a worker holds."""


@dataclass(frozen=True, slots=True)
class Member:
    """One worker or pool as the kvstore knows it."""

    worker_id: str
    role: str
    model: str
    epoch: int
    address: str
    block_size: int
    blocks: int
    capacity: int
    sequence: int
    lease_left_s: float
    draining: bool
    wants_snapshot: bool


@dataclass(frozen=True, slots=True)
class Reached:
    """With tiers up to this one a worker's prefix has `blocks`; no worker means every other one."""

    worker_id: str
    tier: str
    blocks: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """The store's view of a worker beside the worker's own. `missing` costs hits, `stale` sends requests to blocks
    that are not there. `error` says why the worker could not be asked."""

    worker_id: str
    held: int = 0
    stored: int = 0
    missing: int = 0
    stale: int = 0
    error: str = ""

    @property
    def agrees(self) -> bool:
        return not (self.missing or self.stale or self.error)


class KvStoreClient:
    """One kvstore. Raises NoAnswer when it cannot be asked."""

    def __init__(self, address: str) -> None:
        self._address = reachable(address)

    async def members(self, model: str = "") -> tuple[list[Member], bool]:
        """Members by name, and whether the store answers from memory because Redis is away."""
        answer = await self._ask(lambda stub: stub.ListWorkers(kvstore_pb.ListWorkersRequest(model=model)))
        return sorted(map(_member, answer.workers), key=lambda member: member.worker_id), answer.degraded

    async def lookup(self, model: str, block_size: int, block_keys: bytes) -> list[Reached]:
        """How far each worker's prefix reaches, tier by tier."""
        request = kvstore_pb.LookupRequest(model=model, block_size=block_size, block_keys=block_keys)
        answer = await self._ask(lambda stub: stub.Lookup(request))
        return [Reached(match.worker_id, _tier(match), match.num_blocks) for match in answer.matches]

    async def held(self, worker_id: str) -> Held:
        request = kvstore_pb.ListBlocksRequest(worker_id=worker_id)
        held: Held = await self._ask(lambda stub: _collected(stub.ListBlocks(request)))
        return held

    async def _ask(self, call: Callable[[Any], Awaitable[Any]]) -> Any:
        try:
            async with channel(self._address, tls=tls_of_command()) as connected, asyncio.timeout(ASK_TIMEOUT_S):
                return await call(KvStoreServiceStub(connected))  # type: ignore[no-untyped-call]
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            raise NoAnswer(f"kvstore at {self._address}: {_why(error)}") from None

    async def verify(self, members: Sequence[Member], settle_s: float) -> list[Verdict]:
        """Compare with what each worker says it holds. What is on its way for less than `settle_s` is no difference."""
        return list(await asyncio.gather(*(self._verify(member, settle_s) for member in members)))

    async def _verify(self, member: Member, settle_s: float) -> Verdict:
        try:
            missing, stale, held, stored = await self._difference(member)
            if missing or stale:
                await asyncio.sleep(settle_s)
                later_missing, later_stale, held, stored = await self._difference(member)
                missing, stale = missing & later_missing, stale & later_stale
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            return Verdict(member.worker_id, error=_why(error))
        return Verdict(member.worker_id, held, stored, len(missing), len(stale))

    async def _difference(self, member: Member) -> tuple[Held, Held, int, int]:
        stored = await self.held(member.worker_id)
        async with channel(member.address, tls=tls_of_command()) as connected, asyncio.timeout(ASK_TIMEOUT_S):
            stub: Any = WorkerServiceStub(connected)  # type: ignore[no-untyped-call]
            held = await _collected(stub.ListBlocks(worker_pb.ListBlocksRequest()))
        return held - stored, stored - held, len(held), len(stored)


class ProxyPages:
    """The proxy's pages: workers, its replica of the index, decisions. Raises NoAnswer when it cannot be asked."""

    def __init__(self, url: str) -> None:
        self._url = base_url(url)

    async def workers(self) -> dict[str, Any]:
        return await self._ask("GET", "/workers")

    async def prefix(self, body: dict[str, Any]) -> dict[str, Any]:
        return await self._ask("POST", "/kv/prefix", json=body)

    async def hottest(self, limit: int) -> dict[str, Any]:
        return await self._ask("GET", f"/kv/hottest?limit={limit}")

    async def summary(self) -> dict[str, Any]:
        return await self._ask("GET", "/kv")

    async def config(self) -> dict[str, Any]:
        return await self._ask("GET", "/config")

    async def decision(self, request_id: str, limit: int) -> dict[str, Any]:
        return await self._ask("GET", f"/decisions/{quote(request_id, safe='')}?limit={limit}")

    async def decisions(self, limit: int) -> dict[str, Any]:
        return await self._ask("GET", f"/decisions?limit={limit}")

    async def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            async with httpx.AsyncClient(timeout=ASK_TIMEOUT_S, **http_options()) as client:
                response = await client.request(method, self._url + path, **options)
                content: dict[str, Any] = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise NoAnswer(f"proxy at {self._url}: {why(error)}") from None
        if response.status_code != 200:
            message = content.get("error", {}).get("message", f"status {response.status_code}")
            raise NoAnswer(f"proxy at {self._url}: {message}")
        return content


def _tier(match: kvstore_pb.PrefixMatch) -> str:
    return f"pool:{match.pool}" if match.pool else kv_pb2.Medium.Name(match.medium).removeprefix("MEDIUM_").lower()


async def _collected(pages: Any) -> Held:
    return {(page.medium, key) async for page in pages for key in _split(page.block_keys)}


def _split(keys: bytes) -> Iterable[bytes]:
    return (keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES))


def _member(state: kvstore_pb.WorkerState) -> Member:
    info = state.info
    return Member(
        worker_id=info.worker_id,
        role=engine_pb2.Role.Name(info.role).removeprefix("ROLE_").lower(),
        model=info.model,
        epoch=info.epoch,
        address=info.address,
        block_size=info.block_size,
        blocks=state.num_blocks,
        capacity=info.num_blocks,
        sequence=state.sequence,
        lease_left_s=state.lease_left_s,
        draining=state.draining,
        wants_snapshot=state.wants_snapshot,
    )


def _why(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {rpc_errors.why(error)}"
    return f"no answer within {ASK_TIMEOUT_S:.0f} s"
