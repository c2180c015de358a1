"""The Redis side: every operation is one script or one read; failures arrive as `Unavailable`."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from redis.exceptions import NoScriptError, RedisError, ResponseError

from omni_common.errors import FailedPrecondition, Unavailable
from omni_kvstore import events
from omni_kvstore.blocks import Batch, BlockChange, BlockEvent, Match, parts_of
from omni_kvstore.client import RedisClient, Source
from omni_kvstore.events import Event
from omni_kvstore.membership import Renewal, Worker
from omni_kvstore.metrics import Metrics
from omni_kvstore.schema import SCHEMA, SCRIPTS, Keys, namespace, script

PART_BLOCKS = 1024
PAGE_BLOCKS = 2048
EVENTS_PER_READ = 256
_CLOSED = "the handler is closed"
"""In uvloop's RuntimeError for a connection that Redis ended before anything was written."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in milliseconds; `max_events` bounds the event stream, the others count blocks of one worker and of all."""

    lease_ms: int
    block_ttl_ms: int
    max_events: int
    max_blocks_per_worker: int
    max_entries: int


@dataclass(frozen=True, slots=True)
class Published:
    """What became of a batch; a gap leaves `sequence` at the last batch accepted."""

    sequence: int
    gap: bool


@dataclass(frozen=True, slots=True)
class Reaped:
    ended: int
    trash: int
    leases: int


@dataclass(frozen=True, slots=True)
class Standing:
    """A member and the state of its lease and blocks."""

    worker: Worker
    sequence: int
    wants_snapshot: bool
    num_blocks: int
    lease_left_s: float


@dataclass(frozen=True, slots=True)
class State:
    """All members at event `position` of `dataset`; `entries` counts (block, worker), those to be swept too."""

    dataset: str
    position: int
    entries: int
    standings: tuple[Standing, ...]

    @property
    def workers(self) -> tuple[Worker, ...]:
        return tuple(standing.worker for standing in self.standings)


class RedisStore:
    """One cluster's keys in one Redis."""

    def __init__(self, client: RedisClient, cluster: str, limits: Limits, metrics: Metrics) -> None:
        self._client = client
        self._keys = Keys(cluster)
        self._limits = limits
        self._metrics = metrics
        self._scripts = {name: Source.of(script(name)) for name in SCRIPTS}

    async def register(self, worker: Worker) -> Renewal:
        """Take the lease, or renew it; a higher epoch ends the known one."""
        accepted, epoch, wants = await self._run(
            "register",
            *(worker.worker_id, worker.epoch, worker.info, worker.model, worker.block_size, int(worker.draining)),
            *(worker.pool_medium, self._limits.lease_ms, self._limits.block_ttl_ms // 2, self._limits.max_events),
        )
        return Renewal(bool(accepted), int(epoch), bool(wants))

    async def leave(self, worker_id: str, epoch: int) -> None:
        """End the membership of that epoch at once, if it is the one in force."""
        await self._run("leave", worker_id, epoch, self._limits.max_events)

    async def want_snapshot(self, worker_id: str, epoch: int) -> None:
        """Have the epoch asked for a snapshot at its next heartbeat."""
        await self._run("want", worker_id, epoch)

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

    async def _publish_part(self, batch: Batch, part: Sequence[BlockEvent], *, opens: bool, commits: bool) -> Published:
        flags, limits = (batch.snapshot and opens, commits, batch.snapshot), self._limits
        outcome, value, evicted = await self._run(
            "publish",
            *(batch.worker_id, batch.epoch, batch.sequence, *map(int, flags)),
            *(limits.block_ttl_ms, limits.max_events, limits.max_blocks_per_worker, limits.max_entries),
            events.packed(part),
        )
        if outcome == b"stale":
            raise FailedPrecondition(f"epoch {batch.epoch} ended; {int(value)} is in force", reason="stale_epoch")
        if outcome == b"unknown":
            message = f"worker {batch.worker_id!r} holds no lease for epoch {batch.epoch}"
            raise FailedPrecondition(message, reason="not_registered")
        self._metrics.evicted.inc(evicted)
        return Published(int(value), gap=outcome == b"gap")

    async def lookup(self, model: str, block_size: int, keys: bytes) -> list[Match]:
        """How far each worker's prefix of `keys` reaches, tier by tier."""
        flat = await self._run("lookup", namespace(model, block_size), keys)
        rows = zip(flat[::4], flat[1::4], flat[2::4], flat[3::4], strict=True)
        return [Match(worker.decode(), medium, pool.decode(), blocks) for worker, medium, pool, blocks in rows]

    async def reap(self) -> Reaped:
        """End the memberships whose lease is over."""
        return Reaped(*await self._run("reap", self._limits.lease_ms, self._limits.max_events))

    async def sweep(self, budget: int) -> int:
        """Remove at most `budget` entries of ended epochs; returns how many runs still wait."""
        return int(await self._run("sweep", budget))

    async def load(self) -> State:
        """All members at one point of the event stream.

        Raises:
            FailedPrecondition: the keys in Redis are of another schema.
        """
        found, dataset, position, entries, rows = await self._run("load", SCHEMA, secrets.token_hex(8))
        if int(found) != SCHEMA:
            raise FailedPrecondition(
                f"Redis holds schema {int(found)} for cluster {self._keys.cluster!r}; this kvstore speaks {SCHEMA}. "
                "Run `omni-kvstore migrate`, or set OMNI_KVSTORE_CLUSTER to another name",
                reason="schema",
            )
        return State(dataset.decode(), int(position), entries, tuple(map(_standing, rows)))

    async def events_after(self, position: int, wait_ms: int) -> list[tuple[int, Event]]:
        """The next events with their numbers; empty if none came within `wait_ms`."""
        with self._reaching("events"):
            answer: Any = await self._client.xread(
                {self._keys.events: f"{position}-0"}, count=EVENTS_PER_READ, block=wait_ms
            )
        streams = list(answer.items()) if isinstance(answer, dict) else answer
        return [events.parsed(number, fields) for number, fields in streams[0][1]] if streams else []

    async def events_between(self, after: int, last: int) -> AsyncIterator[list[tuple[int, Event]]]:
        """The events after one number up to another, in pages; they may have been trimmed."""
        while after < last:
            with self._reaching("events"):
                page: Any = await self._client.xrange(
                    self._keys.events, f"{after + 1}-0", f"{last}-0", count=EVENTS_PER_READ
                )
            numbered = [events.parsed(number, fields) for number, fields in page]
            yield numbered
            after = numbered[-1][0] if numbered else last

    async def blocks_of(self, worker_id: str) -> AsyncIterator[BlockChange]:
        """All blocks of a worker in pages and in no order; may repeat some, and misses none that stay throughout."""
        run, cursor = b"", b"0"
        while True:
            epoch, run, cursor, page = await self._run("blocks", worker_id, run, cursor, PAGE_BLOCKS)
            for event in events.stored_page(page):
                yield BlockChange(worker_id, int(epoch), event)
            if cursor == b"0":
                return

    async def used_bytes(self) -> int:
        """Memory of the Redis process that holds this cluster's keys."""
        with self._reaching("info"):
            return await self._client.used_bytes(self._keys.schema)

    async def close(self) -> None:
        await self._client.close()

    async def _run(self, name: str, *arguments: Any) -> Any:
        source, client = self._scripts[name], self._client
        with self._reaching(name):
            try:
                return await client.evalsha(source.sha, self._keys.prefix, *arguments)
            except NoScriptError:
                return await client.eval(source.text, self._keys.prefix, *arguments)

    @contextmanager
    def _reaching(self, operation: str) -> Iterator[None]:
        start_s = time.perf_counter()
        try:
            yield
        except ResponseError as error:
            raise Unavailable(f"Redis refused {operation}: {error}", reason="redis_refused") from error
        except (RedisError, OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and _CLOSED not in str(error):
                raise
            message = f"Redis cannot be reached: {str(error) or type(error).__name__}"
            raise Unavailable(message, reason="redis_unreachable", retry_after_s=1.0) from error
        _honour_cancel()
        self._metrics.redis_seconds.labels(operation).observe(time.perf_counter() - start_s)


def _honour_cancel() -> None:
    """The client writes through `asyncio.wait_for`, which before Python 3.12 can swallow a cancel."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _standing(row: Sequence[Any]) -> Standing:
    name, epoch, info, model, block_size, draining, pool_medium, sequence, gap, blocks, left_ms = row
    worker = Worker(
        name.decode(), int(epoch), model.decode(), int(block_size), info, draining == b"1", int(pool_medium)
    )
    return Standing(worker, int(sequence), gap == b"1" or int(sequence) == 0, blocks, max(0, left_ms) / 1000)
