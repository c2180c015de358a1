"""Messages of the placement contract <-> values of the engine port."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from omni.placement.v1 import placement_service_pb2 as pb
from omni_common.errors import InvalidRequest
from omni_engine.ports import EngineInfo, ExpertLayout, ExpertMove

Slots = npt.NDArray[np.int32]
EMPTY = -1


@dataclass(frozen=True, slots=True)
class Step:
    """One round: what is copied, and what every slot holds afterwards, (layers, ranks, slots)."""

    moves: tuple[ExpertMove, ...]
    physical: Slots


@dataclass(frozen=True, slots=True)
class Order:
    """What the placement service asks for: the steps in order, the last one ending at `target`."""

    migration_id: str
    target: ExpertLayout
    steps: tuple[Step, ...]

    @property
    def num_moves(self) -> int:
        return sum(len(step.moves) for step in self.steps)


def topology_to_wire(info: EngineInfo) -> pb.Topology:
    return pb.Topology(
        num_layers=info.num_moe_layers,
        num_experts=info.num_experts,
        num_ranks=info.num_ep_ranks,
        slots_per_rank=info.expert_slots_per_rank,
        ranks_per_host=info.ranks_per_host,
        expert_bytes=info.expert_bytes,
    )


def layout_to_wire(info: EngineInfo, group: str, layout: ExpertLayout) -> pb.Layout:
    return pb.Layout(
        model=info.model,
        group=group,
        layout_version=layout.version,
        topology=topology_to_wire(info),
        physical_to_logical=layout.physical.ravel().tolist(),
    )


def order_from_wire(message: pb.WatchLayoutsResponse, held: ExpertLayout) -> Order:
    """The order, worked out from what the ranks hold.

    Raises InvalidRequest where the layout is of another shape or the rounds do not lead to it.
    """
    shape = held.physical.shape
    wire = message.layout
    if _shape(wire.topology) != shape or len(wire.physical_to_logical) != held.physical.size:
        raise InvalidRequest(f"layout {wire.layout_version} is not one of {shape}", field="layout.topology")
    physical, steps = held.physical, []
    for number, step in enumerate(message.rounds, 1):
        moves = tuple(_move(move) for move in step.moves)
        physical = _after(physical, moves, step.drops, number)
        steps.append(Step(moves, physical))
    target = np.array(wire.physical_to_logical, dtype=np.int32).reshape(shape)
    if not np.array_equal(target, physical):
        raise InvalidRequest(f"the rounds do not lead to layout {wire.layout_version}", field="rounds")
    return Order(message.migration_id, ExpertLayout(wire.layout_version, target), tuple(steps))


def _shape(topology: pb.Topology) -> tuple[int, int, int]:
    return topology.num_layers, topology.num_ranks, topology.slots_per_rank


def _move(move: pb.ExpertMove) -> ExpertMove:
    return ExpertMove(
        move.layer, move.expert, move.source_rank, move.source_slot, move.target_rank, move.target_slot
    )  # fmt: skip


def _after(physical: Slots, moves: Sequence[ExpertMove], drops: Sequence[pb.ExpertSlot], number: int) -> Slots:
    after = physical.copy()
    try:
        for move in moves:
            if physical[move.layer, move.source_rank, move.source_slot] != move.expert:
                raise InvalidRequest(f"round {number} copies an expert from where it is not", field="rounds.moves")
            after[move.layer, move.target_rank, move.target_slot] = move.expert
        for drop in drops:
            after[drop.layer, drop.rank, drop.slot] = EMPTY
    except IndexError:
        raise InvalidRequest(f"round {number} names a slot that is not there", field="rounds") from None
    return after
