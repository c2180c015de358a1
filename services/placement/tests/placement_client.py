"""Clients of the placement contract: a stub of a running service, and a worker that applies rounds to an array."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from omni.placement.v1 import placement_service_pb2 as pb
from omni.placement.v1.placement_service_pb2_grpc import PlacementServiceStub
from omni_common.rpc import channel
from omni_common.rpc_errors import from_rpc_error
from omni_placement.app import Placement, running
from omni_placement.layout import EMPTY, Layout, Topology
from omni_placement.migration import Drop, Move, Round, apply_rounds
from omni_placement.settings import Settings

DEADLINE_S = 15.0
SHAPE = Topology(2, 4, 3, 2, expert_bytes=100)


class Clock:
    """Unix time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


@asynccontextmanager
async def serving(
    clock: Callable[[], float] = time.time, registry: CollectorRegistry | None = None, **values: Any
) -> AsyncIterator[tuple[Placement, Any]]:
    """A service with these settings, and a stub of it."""
    settings = Settings.model_validate({"port": 0, "rebalance_interval_s": 0, **values})
    async with (
        running(settings, registry or CollectorRegistry(), clock) as placement,
        channel(f"127.0.0.1:{placement.port}") as connected,
    ):
        async with asyncio.timeout(DEADLINE_S):
            await connected.channel_ready()
        yield placement, PlacementServiceStub(connected)  # type: ignore[no-untyped-call]


@asynccontextmanager
async def service(**values: Any) -> AsyncIterator[Any]:
    """A stub of a service with these settings."""
    async with serving(**values) as (_, stub):
        yield stub


async def refused(call: Any) -> Any:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return from_rpc_error(error.value)


def layout_of(*ranks: Sequence[int], shape: Topology = SHAPE) -> Layout:
    """The same experts in every layer; ranks not named are empty."""
    physical = np.full(shape.shape, EMPTY, dtype=np.int32)
    for rank, experts in enumerate(ranks):
        physical[:, rank, : len(experts)] = experts
    return Layout(shape, physical)


def topology_to_wire(shape: Topology) -> pb.Topology:
    return pb.Topology(
        num_layers=shape.num_layers,
        num_experts=shape.num_experts,
        num_ranks=shape.num_ranks,
        slots_per_rank=shape.slots_per_rank,
        expert_bytes=shape.expert_bytes,
    )


class Worker:
    """Holds a layout, watches, and does what it is told, one round at a time."""

    def __init__(self, stub: Any, held: Layout, *, model: str = "m", group: str = "g", worker_id: str = "w") -> None:
        self._stub, self.held = stub, held
        self._names = {"model": model, "group": group, "worker_id": worker_id}
        self.version = 0

    def watch(self) -> Any:
        shape = self.held.topology
        held = pb.Layout(
            layout_version=self.version,
            topology=topology_to_wire(shape),
            physical_to_logical=self.held.physical.ravel().tolist(),
        )
        return self._stub.WatchLayouts(pb.WatchLayoutsRequest(held=held, **self._names), timeout=DEADLINE_S)

    async def begin(self) -> tuple[Any, pb.WatchLayoutsResponse]:
        """A watch and its first order."""
        watch = self.watch()
        return watch, await watch.read()

    def apply(self, step: pb.MigrationRound) -> None:
        """One round; the layout after it is valid, and no rank sends or receives more than one expert."""
        moves = [
            Move(m.layer, m.expert, m.source_rank, m.source_slot, m.target_rank, m.target_slot) for m in step.moves
        ]
        assert len({m.source_rank for m in moves}) == len({m.target_rank for m in moves}) == len(moves)
        drops = [Drop(d.layer, d.rank, d.slot) for d in step.drops]
        self.held = apply_rounds(self.held, [Round(tuple(moves), tuple(drops))])

    async def ack(
        self,
        order: pb.WatchLayoutsResponse,
        rounds_done: int,
        outcome: pb.MigrationOutcome = pb.MIGRATION_OUTCOME_APPLYING,
        **fields: Any,
    ) -> None:
        answer = {"layout_version": order.layout.layout_version, "migration_id": order.migration_id, **self._names}
        request = pb.AckLayoutRequest(rounds_done=rounds_done, outcome=outcome, **{**answer, **fields})
        await self._stub.AckLayout(request, timeout=DEADLINE_S)

    async def carry_out(self, order: pb.WatchLayoutsResponse) -> None:
        """All rounds, each acknowledged."""
        for done, step in enumerate(order.rounds, 1):
            self.apply(step)
            if done < len(order.rounds):
                await self.ack(order, done)
        assert self.held.physical.ravel().tolist() == list(order.layout.physical_to_logical)
        self.version = order.layout.layout_version
        await self.ack(order, len(order.rounds), pb.MIGRATION_OUTCOME_APPLIED)


async def ended(watch: Any) -> bool:
    """Whether the service ends the stream, rather than send something."""
    return await watch.read() is grpc.aio.EOF
