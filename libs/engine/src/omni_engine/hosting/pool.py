"""A shared pool of blocks in the cluster: its membership and its blocks, for whoever runs one.

pool = PoolPublisher(channel, info)
task = group.create_task(pool.run())
pool.store(keys_of_a_prompt, first=2)       # blocks 2 and later of the prompt are in the pool
pool.remove(keys)
"""

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import grpc

from omni.engine.v1.engine_pb2 import ROLE_STORE, PoolCost, WorkerInfo
from omni_common.blocks import KEY_BYTES, SPAN_BLOCKS
from omni_engine.hosting.admission import Admission
from omni_engine.hosting.membership import Membership
from omni_engine.hosting.mirror import Block, Change
from omni_engine.hosting.publisher import BlockPublisher
from omni_engine.hosting.wire import MEDIA
from omni_engine.ports import Medium


@dataclass(frozen=True, slots=True)
class LoadCost:
    """What loading blocks costs a worker: `latency_ms` for one load, whatever its size, and `ms_per_block`."""

    latency_ms: float
    ms_per_block: float


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """One start of a pool, reached at `address`; a later start has a higher `epoch` and begins empty.

    `medium` is host, disk or remote; `num_blocks` is the capacity, more are not published.
    """

    pool_id: str
    model: str
    block_size: int
    num_blocks: int
    medium: Medium
    cost: LoadCost
    epoch: int
    address: str
    labels: Mapping[str, str] = field(default_factory=dict)

    def to_wire(self) -> WorkerInfo:
        cost = PoolCost(medium=MEDIA[self.medium], latency_ms=self.cost.latency_ms, ms_per_block=self.cost.ms_per_block)
        return WorkerInfo(
            worker_id=self.pool_id,
            address=self.address,
            role=ROLE_STORE,
            epoch=self.epoch,
            model=self.model,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            labels=self.labels,
            pool=cost,
        )


class PoolPublisher:
    """Tells the kvstore which blocks a pool holds, and everything again whenever it asks."""

    def __init__(self, channel: grpc.aio.Channel, info: PoolInfo, interval_s: float = 0.2) -> None:
        if info.medium is Medium.HBM:
            raise ValueError("a pool's medium is host, disk or remote")
        self._info = info
        self._blocks: dict[bytes, Block] = {}
        self._publisher = BlockPublisher(channel, info.pool_id, info.epoch, self._pages, interval_s)
        admission = Admission(info.model)
        self._membership = Membership(channel, info.to_wire, admission, self._publisher.request_snapshot)
        self.refused = 0

    def __len__(self) -> int:
        return len(self._blocks)

    async def run(self) -> None:
        """Register and publish until cancelled; cancelling leaves the cluster."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._membership.run(), name="pool-membership")
            group.create_task(self._publisher.run(self._membership.registered), name="pool-publisher")

    def store(self, prompt_keys: bytes, first: int = 0) -> None:
        """Blocks `first` and later of a prompt are in the pool; `prompt_keys` has the keys of all its blocks.

        Blocks beyond the pool's capacity are not published and count as `refused`.
        """
        changes = []
        for position in range(first, len(prompt_keys) // KEY_BYTES):
            key = _key_at(prompt_keys, position)
            if key in self._blocks:
                continue
            if len(self._blocks) >= self._info.num_blocks:
                self.refused += 1
                continue
            block = Block(key, position, _key_at(prompt_keys, position - position % SPAN_BLOCKS))
            self._blocks[key] = block
            changes.append(Change(self._info.medium, block, True))
        self._publisher.add(changes, _now_ms())

    def remove(self, keys: bytes) -> None:
        """Blocks of these keys are gone; unknown ones are ignored."""
        gone = (self._blocks.pop(_key_at(keys, index), None) for index in range(len(keys) // KEY_BYTES))
        changes = [Change(self._info.medium, block, False) for block in gone if block is not None]
        self._publisher.add(changes, _now_ms())

    def clear(self) -> None:
        """The pool is empty."""
        self._blocks = {}
        self._publisher.clear(_now_ms())

    def _pages(self, size: int) -> Iterator[tuple[Medium, list[Block]]]:
        """What is held now. Blocks that leave while the pages are read are told as removed after them."""
        blocks = list(self._blocks.values())
        for start in range(0, len(blocks), size):
            yield self._info.medium, blocks[start : start + size]


def _key_at(keys: bytes, index: int) -> bytes:
    return keys[index * KEY_BYTES : (index + 1) * KEY_BYTES]


def _now_ms() -> int:
    return int(time.time() * 1e3)
