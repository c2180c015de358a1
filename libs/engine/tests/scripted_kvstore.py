"""A kvstore over real gRPC that remembers what it was told, and answers as a test says."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from omni.kvstore.v1 import kvstore_service_pb2 as wire
from omni.kvstore.v1.kvstore_service_pb2_grpc import KvStoreServiceServicer, add_KvStoreServiceServicer_to_server
from omni_common.blocks import KEY_BYTES, SPAN_BLOCKS
from omni_common.rpc import Server, Servicer

Place = tuple[int, bytes]


class Picture:
    """What a store knows of one member after its batches: {(medium, key): (position, span)}. Checks the contract."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[int, bytes], Place] = {}

    def apply(self, batch: wire.PublishBlocksRequest) -> None:
        if batch.snapshot:
            self.blocks.clear()
        for event in batch.events:
            keys = [event.block_keys[i : i + KEY_BYTES] for i in range(0, len(event.block_keys), KEY_BYTES)]
            if event.action == wire.BLOCK_ACTION_CLEARED:
                assert not keys
                self.blocks.clear()
                continue
            assert keys
            assert len(event.span) == KEY_BYTES
            if event.action == wire.BLOCK_ACTION_REMOVED:
                for key in keys:
                    self.blocks.pop((event.medium, key), None)
                continue
            positions = list(event.positions)
            if len(positions) == 1:
                positions = list(range(positions[0], positions[0] + len(keys)))
            assert sorted(positions) == positions
            assert len({position // SPAN_BLOCKS for position in positions}) == 1
            for key, position in zip(keys, positions, strict=True):
                self.blocks[event.medium, key] = (position, event.span)


class KvStore(KvStoreServiceServicer):
    """`told` is set at every message; `refusal` ends each stream of blocks at its first message."""

    def __init__(self, lease_s: float = 0.3) -> None:
        self.lease_s = lease_s
        self.registers: list[wire.RegisterRequest] = []
        self.batches: list[wire.PublishBlocksRequest] = []
        self.told = asyncio.Event()
        self.wants_snapshot = False
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        self.is_accepting = asyncio.Event()
        self.is_accepting.set()
        self.port = 0

    async def Register(
        self, requests: AsyncIterator[wire.RegisterRequest], context: Any
    ) -> AsyncIterator[wire.RegisterResponse]:
        async for request in requests:
            self.registers.append(request)
            self.told.set()
            yield wire.RegisterResponse(epoch=1, lease_s=self.lease_s, wants_snapshot=self.wants_snapshot)
            self.wants_snapshot = False

    async def PublishBlocks(
        self, requests: AsyncIterator[wire.PublishBlocksRequest], context: Any
    ) -> wire.PublishBlocksResponse:
        async for request in requests:
            await self.is_accepting.wait()
            self.batches.append(request)
            self.told.set()
            if self.refusal is not None:
                await context.abort(*self.refusal)
        return wire.PublishBlocksResponse()

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self.told.clear()
                await self.told.wait()

    def picture(self) -> dict[tuple[int, bytes], Place]:
        picture = Picture()
        for batch in self.batches:
            picture.apply(batch)
        return picture.blocks

    def held(self) -> set[bytes]:
        """Keys of the member, on whatever medium."""
        return {key for _, key in self.picture()}


@asynccontextmanager
async def kvstore(address: str = "127.0.0.1:0", **values: Any) -> AsyncIterator[KvStore]:
    servicer = KvStore(**values)
    service = Servicer(servicer, add_KvStoreServiceServicer_to_server, "omni.kvstore.v1.KvStoreService")
    server = Server([service])
    servicer.port = await server.start(address)
    try:
        yield servicer
    finally:
        servicer.is_accepting.set()
        await server.stop(0)
