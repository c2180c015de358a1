"""A real redis-server, replicas of the service on it, and workers and watchers that speak to them."""

import asyncio
import contextlib
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from omni.engine.v1 import engine_pb2
from omni.kvstore.v1 import kvstore_service_pb2 as pb
from omni.kvstore.v1.kvstore_service_pb2_grpc import KvStoreServiceStub
from omni_common.rpc import channel
from omni_kvstore.app import KvStore, running
from omni_kvstore.embedded import executable
from omni_kvstore.settings import Settings

DEADLINE_S = 15.0


class RedisServer:
    """A redis-server on one free port that can be killed and started again, empty."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [executable(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self._process = subprocess.Popen([*command, "--dir", str(self._folder)], stdout=subprocess.DEVNULL)
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
        raise TimeoutError("redis-server does not answer")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Replica:
    """Client of one replica of the service."""

    def __init__(self, kvstore: KvStore, connected: grpc.aio.Channel, registry: CollectorRegistry) -> None:
        self.service, self.channel, self.registry = kvstore, connected, registry
        self.stub: Any = KvStoreServiceStub(connected)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"omni_kvstore_{name}", labels) or 0.0

    def register(self) -> "Lease":
        return Lease(self.stub.Register(timeout=60))

    async def publish(self, *requests: pb.PublishBlocksRequest) -> pb.PublishBlocksResponse:
        answer: pb.PublishBlocksResponse = await self.stub.PublishBlocks(iter(requests), timeout=DEADLINE_S)
        return answer

    async def lookup(self, keys: bytes, **fields: Any) -> dict[tuple[str, int], int]:
        answer = await self.stub.Lookup(pb.LookupRequest(block_keys=keys, **fields), timeout=DEADLINE_S)
        return {(m.worker_id, m.medium): m.num_blocks for m in answer.matches}

    def watch(self, blocks: bool = False) -> "View":
        return View(self.stub.Watch(pb.WatchRequest(blocks=blocks), timeout=60))


class Lease:
    """A Register stream that beats when told to, or by itself."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def beat(self, info: engine_pb2.WorkerInfo | None = None, **fields: Any) -> pb.RegisterResponse:
        async with asyncio.timeout(DEADLINE_S):
            await self._call.write(pb.RegisterRequest(info=info, **fields))
            answer = await self._call.read()
            if answer is grpc.aio.EOF:
                # An ended stream answers with its status.
                raise grpc.aio.AioRpcError(await self._call.code(), None, None, details=await self._call.details())
            return answer  # type: ignore[no-any-return]

    async def leave(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self._call.write(pb.RegisterRequest(leave=True))
            assert await self._call.read() is grpc.aio.EOF

    @asynccontextmanager
    async def beating(self, info: engine_pb2.WorkerInfo, period_s: float) -> AsyncIterator[None]:
        async def beat_on() -> None:
            while True:
                await self.beat(info)
                await asyncio.sleep(period_s)

        await self.beat(info)
        task = asyncio.create_task(beat_on())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


class View:
    """What a watcher knows after the messages read so far."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.version = 0
        self.snapshots = 0
        self.degraded = False
        self.workers: dict[str, engine_pb2.WorkerInfo] = {}
        self.draining: set[str] = set()
        self.blocks: set[tuple[str, int, bytes]] = set()

    async def until(self, condition: "Callable[[View], bool]") -> None:
        """Read until the condition holds; it is looked at after every message."""
        async with asyncio.timeout(DEADLINE_S):
            while not (self.version and condition(self)):
                self._apply(await self._call.read())

    async def end(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self._apply(message)

    def _apply(self, message: pb.WatchResponse) -> None:
        assert message.version == self.version + 1
        self.version, self.degraded = message.version, message.degraded
        if message.snapshot:
            self.snapshots += 1
            self.workers.clear()
            self.draining.clear()
            self.blocks.clear()
        for change in message.workers:
            self._apply_worker(change)
        for blocks in message.blocks:
            self._apply_blocks(blocks)

    def _apply_worker(self, change: pb.WorkerChange) -> None:
        name = change.info.worker_id
        self.draining.discard(name)
        if change.removed:
            assert self.workers[name].epoch == change.info.epoch
            del self.workers[name]
            self.blocks = {entry for entry in self.blocks if entry[0] != name}
        else:
            self.workers[name] = change.info
            self.draining |= {name} if change.draining else set()

    def _apply_blocks(self, change: pb.BlockChange) -> None:
        keys, event = change.event.block_keys, change.event
        named = {(change.worker_id, event.medium, keys[i : i + 16]) for i in range(0, len(keys), 16)}
        if event.action == pb.BLOCK_ACTION_STORED:
            self.blocks |= named
        elif event.action == pb.BLOCK_ACTION_REMOVED:
            self.blocks -= named
        else:
            self.blocks = {entry for entry in self.blocks if entry[0] != change.worker_id}


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def stopped_redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    yield server
    server.kill()


@asynccontextmanager
async def _replica(**values: Any) -> AsyncIterator[Replica]:
    registry = CollectorRegistry()
    settings = Settings.model_validate({"port": 0, "lease_s": 30.0, "reconcile_s": 2.0, **values})
    async with running(settings, registry) as kvstore, channel(f"127.0.0.1:{kvstore.port}") as connected:
        async with asyncio.timeout(DEADLINE_S):
            await connected.channel_ready()
        yield Replica(kvstore, connected, registry)


@pytest.fixture
def start_replica() -> Callable[..., contextlib.AbstractAsyncContextManager[Replica]]:
    """A replica of the service with settings of choice, once it follows Redis unless told `wait=False`."""

    @asynccontextmanager
    async def start(*, wait: bool = True, **values: Any) -> AsyncIterator[Replica]:
        async with _replica(**values) as replica:
            if wait:
                async with asyncio.timeout(DEADLINE_S):
                    await replica.service.replica.answered_once.wait()
            yield replica

    return start


@pytest.fixture
async def replica(redis_server: RedisServer, start_replica: Any) -> AsyncIterator[Replica]:
    async with start_replica(redis_url=redis_server.url) as started:
        yield started


@pytest.fixture
def info() -> Callable[..., engine_pb2.WorkerInfo]:
    def make(worker_id: str = "w1", epoch: int = 1000, **fields: Any) -> engine_pb2.WorkerInfo:
        defaults: dict[str, Any] = {"address": "127.0.0.1:1", "model": "m", "block_size": 16}
        return engine_pb2.WorkerInfo(worker_id=worker_id, epoch=epoch, **{**defaults, **fields})

    return make


@pytest.fixture
def batch() -> Callable[..., pb.PublishBlocksRequest]:
    """A batch of (action, keys) or (action, keys, medium) events."""
    actions = {
        "stored": pb.BLOCK_ACTION_STORED,
        "removed": pb.BLOCK_ACTION_REMOVED,
        "cleared": pb.BLOCK_ACTION_CLEARED,
    }

    def make(
        sequence: int, *events: Any, worker_id: str = "w1", epoch: int = 1000, snapshot: bool = False
    ) -> pb.PublishBlocksRequest:
        wire = []
        for action, *rest in events:
            block_keys, medium = (*rest, *(b"", 1)[len(rest) :])
            wire.append(pb.BlockEvent(action=actions[action], block_keys=block_keys, medium=medium))
        return pb.PublishBlocksRequest(
            worker_id=worker_id, epoch=epoch, sequence=sequence, snapshot=snapshot, events=wire
        )

    return make


@pytest.fixture
def keys() -> Callable[..., bytes]:
    """Block keys by number."""
    return lambda *numbers: b"".join(number.to_bytes(16, "big") for number in numbers)
