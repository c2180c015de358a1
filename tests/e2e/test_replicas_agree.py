"""Real proxies over a real kvstore: late, cut off, stalled or undisturbed, they end with the same replica.

The kvstore's stream and queues are made short, so that whoever is away for long misses more than they hold.
"""

import asyncio
import contextlib
import json
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from prometheus_client import CollectorRegistry

from omni.engine.v1 import engine_pb2
from omni.kvstore.v1 import kvstore_service_pb2 as pb
from omni.kvstore.v1.kvstore_service_pb2_grpc import KvStoreServiceStub
from omni_common.blocks import KEY_BYTES
from omni_common.rpc import channel
from omni_proxy.app import running
from omni_proxy.replica import Replica
from omni_proxy.settings import Settings

pytestmark = [pytest.mark.stack, pytest.mark.timeout(180)]

MODEL_DIR = Path(__file__).resolve().parents[2] / "models" / "tiny-moe"
DEADLINE_S = 60.0
WORKERS = ("w1", "w2", "w3")
PROMPTS = [[random.Random(seed * 1000 + i).randbytes(KEY_BYTES) for i in range(60)] for seed in range(20)]
SHORT, LONG = 40, 1500
"""Batches published while somebody is away: fewer, and far more, than the stream keeps."""


@asynccontextmanager
async def kvstore_process(folder: Path) -> AsyncIterator[str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "omni_kvstore"),
        env={
            "OMNI_KVSTORE_PORT": "0",
            "OMNI_KVSTORE_EMBEDDED_REDIS_DIR": str(folder / "redis"),
            "OMNI_KVSTORE_MAX_EVENTS": "256",
            "OMNI_KVSTORE_WATCH_QUEUE": "64",
            "OMNI_KVSTORE_LEASE_S": "120",
        },
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(DEADLINE_S):
            while b'"serving"' not in (line := await process.stderr.readline()):
                assert line, "kvstore ended before serving"
        yield f"127.0.0.1:{json.loads(line)['port']}"
    finally:
        process.terminate()
        await process.communicate()


class Line:
    """A TCP line to the kvstore that can be cut, or stalled so that nothing gets through any more."""

    def __init__(self, target: str) -> None:
        self._host, _, self._port = target.rpartition(":")
        self._flows = asyncio.Event()
        self._flows.set()
        self._is_cut = False
        self._writers: set[asyncio.StreamWriter] = set()
        self.address = ""

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Line"]:
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            self.cut()
            self._flows.set()
            server.close()
            await server.wait_closed()

    def cut(self) -> None:
        self._is_cut = True
        for writer in self._writers:
            writer.transport.abort()

    def mend(self) -> None:
        self._is_cut = False

    def stall(self) -> None:
        self._flows.clear()

    def flow(self) -> None:
        self._flows.set()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection(self._host, int(self._port))
        pair = {writer, far_writer}
        self._writers |= pair
        try:
            await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))
        except OSError:
            pass
        finally:
            self._writers -= pair
            for end in pair:
                end.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            await self._flows.wait()
            writer.write(data)
            await writer.drain()
        writer.close()


class Publishers:
    """Workers that store and drop blocks at random, and what they truly hold."""

    def __init__(self, stub: Any) -> None:
        self._stub, self._random = stub, random.Random(7)
        self._leases: list[Any] = []
        self.held: dict[str, set[bytes]] = {worker: set() for worker in WORKERS}
        self._sequences = dict.fromkeys(WORKERS, 0)

    async def register(self) -> None:
        for worker in WORKERS:
            info = engine_pb2.WorkerInfo(
                worker_id=worker, address="127.0.0.1:1", epoch=1, model=MODEL_DIR.name, block_size=16,
                role=engine_pb2.ROLE_DECODE,
            )  # fmt: skip
            call = self._stub.Register()
            await call.write(pb.RegisterRequest(info=info))
            await call.read()
            self._leases.append(call)

    async def publish(self, batches: int) -> None:
        for _ in range(batches):
            worker = self._random.choice(WORKERS)
            self._sequences[worker] += 1
            request = pb.PublishBlocksRequest(
                worker_id=worker, epoch=1, sequence=self._sequences[worker], events=[self._event(worker)]
            )
            answer = await self._stub.PublishBlocks(iter([request]), timeout=DEADLINE_S)
            assert not answer.wants_snapshot

    def _event(self, worker: str) -> pb.BlockEvent:
        prompt = self._random.choice(PROMPTS)
        first = self._random.randrange(len(prompt))
        keys = prompt[first : first + self._random.randrange(1, 20)]
        fields: dict[str, Any] = {"medium": 1, "block_keys": b"".join(keys), "span": prompt[0]}
        draw = self._random.random()
        if draw < 0.02:
            self.held[worker].clear()
            return pb.BlockEvent(action=pb.BLOCK_ACTION_CLEARED)
        if draw < 0.4:
            self.held[worker] -= set(keys)
            return pb.BlockEvent(action=pb.BLOCK_ACTION_REMOVED, **fields)
        self.held[worker] |= set(keys)
        return pb.BlockEvent(action=pb.BLOCK_ACTION_STORED, positions=[first], **fields)


@asynccontextmanager
async def proxy(kvstore: str) -> AsyncIterator[Replica]:
    """A whole proxy; its workers are not there, which is nothing to its replica."""
    settings = Settings.model_validate({"model_dir": MODEL_DIR, "kvstore": kvstore})
    async with running(settings, CollectorRegistry(), trace.get_tracer("test")) as started:
        yield started.fleet.replica


def held(replica: Replica) -> dict[str, set[bytes]]:
    found: dict[str, set[bytes]] = {worker: set() for worker in WORKERS}
    for holder, _ in replica.holders():
        for _, keys, _ in replica.index.held(holder.id):
            found[holder.id] |= {keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)}
    return found


async def until_right(replica: Replica, truth: dict[str, set[bytes]]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while held(replica) != truth:  # noqa: ASYNC110, nothing tells of changes but the index itself
            await asyncio.sleep(0.02)


async def test_late_cut_off_and_stalled_proxies_end_like_the_others(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        address = await stack.enter_async_context(kvstore_process(tmp_path))
        connected = await stack.enter_async_context(channel(address))
        lines = [await stack.enter_async_context(Line(address).open()) for _ in range(3)]
        briefly, long, stalled = lines
        publishers = Publishers(KvStoreServiceStub(connected))  # type: ignore[no-untyped-call]
        await publishers.register()
        witness = await stack.enter_async_context(proxy(address))
        disturbed = [await stack.enter_async_context(proxy(line.address)) for line in lines]
        await publishers.publish(100)
        for replica in (witness, *disturbed):
            await until_right(replica, publishers.held)
            assert (replica.snapshots, replica.resumes) == (1, 0)

        stalled.stall()
        long.cut()
        await publishers.publish(LONG)
        briefly.cut()
        await publishers.publish(SHORT)
        await until_right(witness, publishers.held)
        assert all(held(replica) != publishers.held for replica in disturbed)
        briefly.mend()
        long.mend()
        stalled.flow()
        late = await stack.enter_async_context(proxy(address))
        for replica in (*disturbed, late):
            await until_right(replica, publishers.held)
        await publishers.publish(SHORT)
        for replica in (witness, *disturbed, late):
            await until_right(replica, publishers.held)
        # Away for a short while it went on where it was; for a long one it began anew.
        assert (disturbed[0].snapshots, disturbed[0].resumes) == (1, 1)
        assert (disturbed[1].snapshots, disturbed[1].resumes) == (2, 0)
        assert witness.snapshots == 1
