"""A placement service over real gRPC that does as a test says. It sends one round per layer that differs."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from omni.placement.v1 import placement_service_pb2 as pb
from omni.placement.v1.placement_service_pb2_grpc import (
    PlacementServiceServicer,
    add_PlacementServiceServicer_to_server,
)
from omni_common.rpc import Server, Servicer

Slots = npt.NDArray[np.int32]


@dataclass(eq=False)
class Group:
    """`held` is what the service believes the worker's ranks to hold, `target` what it wants there."""

    topology: pb.Topology
    held: Slots
    held_version: int
    target: Slots
    version: int = 1
    excluded: tuple[int, ...] = ()
    migration_id: str = ""
    sent: list[Slots] = field(default_factory=list)
    watches: int = 0


class Placement(PlacementServiceServicer):
    """`told` is set at everything a worker says."""

    def __init__(self) -> None:
        self.groups: dict[str, Group] = {}
        self.acks: list[pb.AckLayoutRequest] = []
        self.reports: list[pb.ReportLoadRequest] = []
        self.told = asyncio.Event()
        self.fail_next_acks = 0
        self.lose_next_reports = 0
        self.refuse_reports = False
        self._changed = asyncio.Condition()
        self._cuts = 0
        self.port = 0

    async def ReportLoad(self, requests: AsyncIterator[pb.ReportLoadRequest], context: Any) -> pb.ReportLoadResponse:
        async for request in requests:
            if self.refuse_reports:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not this shape")
            self.reports.append(request)
            self.told.set()
            if self.lose_next_reports:
                self.lose_next_reports -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "lost on the way back")
        return pb.ReportLoadResponse()

    async def WatchLayouts(
        self, request: pb.WatchLayoutsRequest, context: Any
    ) -> AsyncIterator[pb.WatchLayoutsResponse]:
        held = self._slots(request.held)
        group = self.groups.setdefault(request.group, Group(request.held.topology, held, 0, held))
        group.held, group.held_version, group.sent = held, request.held.layout_version, []
        group.watches += 1
        watch, cuts, told = group.watches, self._cuts, (-1, ())
        self.told.set()
        while (watch, cuts) == (group.watches, self._cuts):
            if told == (group.version, group.excluded):
                async with self._changed:
                    await self._changed.wait()
                continue
            if group.sent:
                return
            told = group.version, group.excluded
            yield self._order(request.group, group)

    async def AckLayout(self, request: pb.AckLayoutRequest, context: Any) -> pb.AckLayoutResponse:
        if self.fail_next_acks:
            self.fail_next_acks -= 1
            await context.abort(grpc.StatusCode.INTERNAL, "not today")
        self.acks.append(request)
        group = self.groups[request.group]
        if request.migration_id == group.migration_id:
            self._note(group, request)
        self.told.set()
        return pb.AckLayoutResponse()

    async def publish(self, group: str, target: Slots) -> None:
        self.groups[group].target = target
        self.groups[group].version += 1
        await self._announce()

    async def exclude(self, group: str, *ranks: int) -> None:
        self.groups[group].excluded = ranks
        await self._announce()

    async def cut(self) -> None:
        """End all watches."""
        self._cuts += 1
        await self._announce()

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self.told.clear()
                await self.told.wait()

    def is_settled(self, group: str) -> bool:
        """The worker has said that it holds what is wanted."""
        known = self.groups.get(group)
        return known is not None and known.held_version == known.version and np.array_equal(known.held, known.target)

    def _note(self, group: Group, ack: pb.AckLayoutRequest) -> None:
        if ack.rounds_done:
            group.held = group.sent[ack.rounds_done - 1]
        if ack.outcome == pb.MIGRATION_OUTCOME_APPLIED:
            group.held, group.held_version, group.sent = group.target, ack.layout_version, []

    def _order(self, name: str, group: Group) -> pb.WatchLayoutsResponse:
        rounds, physical = [], group.held
        for layer in np.unique(np.argwhere(group.held != group.target)[:, 0]):
            rounds.append(_round(int(layer), physical[layer], group.target[layer]))
            physical = physical.copy()
            physical[layer] = group.target[layer]
            group.sent.append(physical)
        group.migration_id = f"{group.version}-{group.watches}"
        layout = pb.Layout(
            group=name,
            layout_version=group.version,
            topology=group.topology,
            physical_to_logical=group.target.ravel().tolist(),
        )
        return pb.WatchLayoutsResponse(
            layout=layout, rounds=rounds, migration_id=group.migration_id, excluded_ranks=group.excluded
        )

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    @staticmethod
    def _slots(layout: pb.Layout) -> Slots:
        shape = layout.topology.num_layers, layout.topology.num_ranks, layout.topology.slots_per_rank
        return np.array(layout.physical_to_logical, dtype=np.int32).reshape(shape)


def _round(layer: int, held: Slots, target: Slots) -> pb.MigrationRound:
    step = pb.MigrationRound()
    for rank, slot in np.argwhere(held != target).tolist():
        expert = int(target[rank, slot])
        if expert < 0:
            step.drops.add(layer=layer, rank=rank, slot=slot)
            continue
        source_rank, source_slot = np.argwhere(held == expert)[0].tolist()
        step.moves.add(
            layer=layer, expert=expert, source_rank=source_rank, source_slot=source_slot, target_rank=rank,
            target_slot=slot,
        )  # fmt: skip
    return step


@asynccontextmanager
async def serving(servicer: Placement, port: int = 0) -> AsyncIterator[Placement]:
    """The service on a port; its state outlives it."""
    service = Servicer(servicer, add_PlacementServiceServicer_to_server, "omni.placement.v1.PlacementService")
    server = Server([service])
    servicer.port = await server.start(f"127.0.0.1:{port}")
    try:
        yield servicer
    finally:
        stopping = asyncio.ensure_future(server.stop(0))
        await servicer.cut()
        await stopping
