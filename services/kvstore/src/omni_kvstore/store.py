"""The Redis side: every operation is one script or one read; failures arrive as `Unavailable`."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from omni_common.errors import FailedPrecondition, Unavailable
from omni_kvstore.membership import Action, Batch, BlockChange, BlockEvent, Match, Renewal, Worker, WorkerLeft, parts_of
from omni_kvstore.metrics import Metrics
from omni_kvstore.schema import HOLDER_MEDIA, SCRIPTS, Keys, script

PART_BLOCKS = 2048
EVENTS_PER_READ = 256
Event = Worker | WorkerLeft | BlockChange


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in milliseconds; `max_events` bounds the event stream."""

    lease_ms: int
    block_ttl_ms: int
    max_events: int


@dataclass(frozen=True, slots=True)
class Published:
    """What became of a batch; a gap leaves `sequence` at the last batch accepted."""

    sequence: int
    gap: bool


@dataclass(frozen=True, slots=True)
class Reaped:
    ended: int
    prolonged: int
    trash: int
    leases: int


@dataclass(frozen=True, slots=True)
class State:
    """All members at event `position` of `dataset`; `entries` counts (block, worker, medium)."""

    dataset: str
    position: int
    entries: int
    workers: tuple[Worker, ...]


class RedisStore:
    """One cluster's keys in one Redis."""

    def __init__(self, client: Redis, cluster: str, limits: Limits, metrics: Metrics) -> None:
        self._client = client
        self._keys = Keys(cluster)
        self._limits = limits
        self._metrics = metrics
        self._scripts = {name: client.register_script(script(name)) for name in SCRIPTS}

    async def register(self, worker: Worker) -> Renewal:
        """Take the lease, or renew it; a higher epoch ends the known one."""
        accepted, epoch, wants = await self._run(
            "register",
            *(worker.worker_id, worker.epoch, worker.info, worker.model, worker.block_size, int(worker.draining)),
            *(self._limits.lease_ms, self._limits.block_ttl_ms // 2, self._limits.max_events),
        )
        return Renewal(bool(accepted), int(epoch), bool(wants))

    async def leave(self, worker_id: str, epoch: int) -> bool:
        """End the membership of that epoch at once; False if it is not the one in force."""
        return bool(await self._run("leave", worker_id, epoch, self._limits.max_events))

    async def publish(self, batch: Batch) -> Published:
        """Apply a batch; one seen before changes nothing.

        Raises:
            FailedPrecondition: another epoch is in force (`stale_epoch`), or none (`not_registered`).
        """
        published = Published(0, gap=False)
        parts = parts_of(batch, PART_BLOCKS)
        for index, part in enumerate(parts):
            published = await self._publish_part(batch, part, opens=index == 0, commits=index == len(parts) - 1)
            if published.gap:
                break
        return published

    async def _publish_part(
        self, batch: Batch, events: Sequence[BlockEvent], *, opens: bool, commits: bool
    ) -> Published:
        flags = (batch.snapshot and opens, commits, batch.snapshot)
        outcome, value = await self._run(
            "publish",
            *(batch.worker_id, batch.epoch, batch.sequence, *map(int, flags)),
            *(self._limits.block_ttl_ms, self._limits.max_events),
            *(argument for e in events for argument in (e.action.value, e.medium, e.keys)),
        )
        if outcome == b"stale":
            raise FailedPrecondition(f"epoch {batch.epoch} ended; {int(value)} is in force", reason="stale_epoch")
        if outcome == b"unknown":
            message = f"worker {batch.worker_id!r} holds no lease for epoch {batch.epoch}"
            raise FailedPrecondition(message, reason="not_registered")
        return Published(int(value), gap=outcome == b"gap")

    async def lookup(self, model: str, block_size: int, keys: bytes) -> list[Match]:
        """Longest leading run of `keys` per worker and medium; 0 and "" match any model and block size."""
        flat = await self._run("lookup", model, block_size, keys)
        rows = zip(flat[::3], flat[1::3], flat[2::3], strict=True)
        return [Match(worker.decode(), medium, blocks) for worker, medium, blocks in rows]

    async def reap(self) -> Reaped:
        """End the memberships whose lease is over."""
        return Reaped(*await self._run("reap", self._limits.lease_ms, self._limits.max_events))

    async def sweep(self, budget: int) -> int:
        """Remove at most `budget` entries of ended epochs; returns how many runs still wait."""
        _, left = await self._run("sweep", budget)
        return int(left)

    async def load(self) -> State:
        """All members at one point of the event stream."""
        dataset, position, entries, rows = await self._run("load", secrets.token_hex(8))
        workers = (Worker(r[0].decode(), int(r[1]), r[3].decode(), int(r[4]), r[2], r[5] == b"1") for r in rows)
        return State(dataset.decode(), int(position), entries, tuple(workers))

    async def events_after(self, position: int, wait_ms: int) -> list[tuple[int, Event]]:
        """The next events with their numbers; empty if none came within `wait_ms`."""
        with self._reaching("events"):
            answer: Any = await self._client.xread(
                {self._keys.events: f"{position}-0"}, count=EVENTS_PER_READ, block=wait_ms
            )
        streams = list(answer.items()) if isinstance(answer, dict) else answer
        return [(int(number.split(b"-")[0]), _event(fields)) for number, fields in streams[0][1]] if streams else []

    async def blocks_of(self, worker_id: str) -> AsyncIterator[BlockChange]:
        """All blocks of a worker in pages and in no order; may repeat some, and misses none that stay throughout."""
        with self._reaching("blocks"):
            epoch, run = await self._client.hmget(self._keys.worker(worker_id), ["epoch", "run"])
        if epoch is None or run is None:
            return
        for medium in HOLDER_MEDIA:
            cursor = 0
            while True:
                with self._reaching("blocks"):
                    held = self._keys.held(int(run), medium)
                    page: Any = await self._client.sscan(held, cursor, count=PART_BLOCKS)
                cursor, keys = int(page[0]), b"".join(page[1])
                if keys:
                    yield BlockChange(worker_id, int(epoch), BlockEvent(Action.STORED, medium, keys))
                if cursor == 0:
                    break

    async def close(self) -> None:
        await self._client.aclose()

    async def _run(self, name: str, *arguments: Any) -> Any:
        with self._reaching(name):
            return await self._scripts[name](keys=[self._keys.prefix], args=list(arguments))

    @contextmanager
    def _reaching(self, operation: str) -> Iterator[None]:
        start_s = time.perf_counter()
        try:
            yield
        except ResponseError as error:
            raise Unavailable(f"Redis refused {operation}: {error}", reason="redis_refused") from error
        except (RedisError, OSError) as error:
            message = f"Redis cannot be reached: {type(error).__name__}"
            raise Unavailable(message, reason="redis_unreachable", retry_after_s=1.0) from error
        _honour_cancel()
        self._metrics.redis_seconds.labels(operation).observe(time.perf_counter() - start_s)


def connect(url: str, *, timeout_s: float, connections: int) -> Redis:
    """A client with bounded waits; one retry covers connections that died while pooled."""
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=timeout_s,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 1),
        protocol=2,
    )
    return Redis.from_pool(pool)


def _honour_cancel() -> None:
    """The client writes through `asyncio.wait_for`, which before Python 3.12 can swallow a cancel."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _event(fields: dict[bytes, bytes]) -> Event:
    worker_id, epoch = fields[b"worker"].decode(), int(fields[b"epoch"])
    kind = fields[b"kind"].decode()
    if kind == "joined":
        model, block_size, is_draining = (
            fields[b"model"].decode(),
            int(fields[b"block_size"]),
            fields[b"draining"] == b"1",
        )
        return Worker(worker_id, epoch, model, block_size, fields[b"info"], is_draining)
    if kind == "left":
        return WorkerLeft(worker_id, epoch)
    return BlockChange(worker_id, epoch, BlockEvent(Action(kind), int(fields[b"medium"]), fields[b"keys"]))
