"""One running placement service, as the commands ask it. Errors are `OmniError`, with the address where it is away."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from omni.placement.v1 import placement_service_pb2 as pb
from omni.placement.v1.placement_service_pb2_grpc import PlacementServiceStub
from omni_common.errors import DeadlineExceeded, InvalidRequest, NotFound, Unavailable
from omni_common.rpc import channel
from omni_common.rpc_errors import from_rpc_error, handshake_failure
from omni_common.settings import tls_of_command
from omni_placement.book import IMPORTED
from omni_placement.commands.formats import Named
from omni_placement.layout import Layout, Topology
from omni_placement.load import Phase
from omni_placement.problem import Loads
from omni_placement.wire import PHASES_TO_WIRE, topology_from_wire, topology_to_wire

ASK_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Group:
    """One engine group; `label` is how it is written on the command line."""

    model: str
    group: str

    @property
    def label(self) -> str:
        return f"{self.model}/{self.group}" if self.group else self.model


@dataclass(frozen=True, slots=True)
class Known:
    """A group's layout in force and the service's account of it."""

    named: Named
    status: pb.GroupStatus


class PlacementService:
    """Asks the service at one address."""

    def __init__(self, address: str) -> None:
        self.address = address

    def groups(self) -> list[pb.GroupStatus]:
        answer = self._ask("ListGroups", pb.ListGroupsRequest())
        return sorted(answer.groups, key=lambda status: (status.model, status.group))

    def resolve(self, label: str, option: str = "--model") -> Group:
        """The group meant by MODEL or MODEL/GROUP, or the only one. Model names may hold slashes.

        Raises:
            NotFound: the service knows no such group.
            InvalidRequest: several are meant; `option` is the one to say which by.
        """
        known = [Group(status.model, status.group) for status in self.groups()]
        exact = [group for group in known if group.label == label]
        meant = exact or [group for group in known if label in ("", group.model)]
        labels = ", ".join(group.label for group in known) or "none"
        if not meant:
            raise NotFound(
                f"no layout of {label!r} is in force (there are: {labels})"
                if label
                else "no layout is in force: no engine with expert-parallel ranks follows this service "
                "(omni up --expert-ranks 2)"
            )
        if len(meant) > 1:
            raise InvalidRequest(f"which one? There are: {labels}", field=option)
        return meant[0]

    def in_force(self, group: Group) -> Known:
        answer = self._ask("GetLayout", pb.GetLayoutRequest(model=group.model, group=group.group))
        return Known(named_from_wire(answer.layout), answer.status)

    def history(self, group: Group, limit: int) -> Sequence[pb.LayoutRecord]:
        """Newest first."""
        request = pb.ListLayoutsRequest(model=group.model, group=group.group, limit=limit)
        records: Sequence[pb.LayoutRecord] = self._ask("ListLayouts", request).records
        return records

    def load(self, group: Group) -> pb.GetLoadResponse:
        answer: pb.GetLoadResponse = self._ask("GetLoad", pb.GetLoadRequest(model=group.model, group=group.group))
        return answer

    def publish(self, group: Group, layout: Layout, *, dry_run: bool) -> pb.PlanResponse:
        """Have exactly this layout put in force. Raises `InvalidRequest` where the service has a reason not to."""
        exact = pb.Layout(
            topology=topology_to_wire(layout.topology), physical_to_logical=layout.physical.ravel().tolist()
        )
        # The name makes a service that does not know `exact` refuse, rather than plan something of its own.
        request = pb.PlanRequest(
            model=group.model, group=group.group, solver=IMPORTED, publish=not dry_run, exact=exact
        )  # fmt: skip
        answer: pb.PlanResponse = self._ask("Plan", request)
        return answer

    def rollback(self, group: Group, version: int) -> Named:
        request = pb.RollbackRequest(model=group.model, group=group.group, to_version=version)
        return named_from_wire(self._ask("Rollback", request).layout)

    def set_ranks(self, group: Group, excluded: Sequence[int]) -> Named:
        request = pb.SetRanksRequest(model=group.model, group=group.group, excluded_ranks=sorted(excluded))
        return named_from_wire(self._ask("SetRanks", request).layout)

    def _ask(self, method: str, request: Any) -> Any:
        async def call() -> Any:
            async with channel(self.address, tls=tls_of_command()) as connected, asyncio.timeout(ASK_TIMEOUT_S):
                stub: Any = PlacementServiceStub(connected)  # type: ignore[no-untyped-call]
                ask: Callable[[Any], Awaitable[Any]] = getattr(stub, method)
                return await ask(request)

        try:
            return asyncio.run(call())
        except TimeoutError:
            raise DeadlineExceeded(f"placement at {self.address} took over {ASK_TIMEOUT_S:.0f} s") from None
        except grpc.aio.AioRpcError as failed:
            error = from_rpc_error(failed)
            if isinstance(error, Unavailable) and not error.reason:
                hint = handshake_failure(failed)
                raise Unavailable(
                    f"placement at {self.address} does not answer" + (f": {hint}" if hint else "")
                ) from None
            raise error from None


def load_from_wire(answer: pb.GetLoadResponse, topology: Topology, phase: Phase | None) -> Loads | None:
    """What a phase routed, or what is expected of all; None where nothing was reported."""
    shape = topology.num_layers, topology.num_experts
    if phase is None and len(answer.forecast):
        return np.array(answer.forecast, dtype=np.float64).reshape(shape)
    wanted = [part for part in answer.loads if phase is None or part.phase == PHASES_TO_WIRE[phase]]
    if not wanted:
        return None
    total = np.sum([np.array(part.load.tokens, dtype=np.float64) for part in wanted], axis=0)
    return np.asarray(total, dtype=np.float64).reshape(shape)


def named_from_wire(layout: pb.Layout) -> Named:
    topology = topology_from_wire(layout.topology)
    physical = np.array(layout.physical_to_logical, dtype=np.int32).reshape(topology.shape)
    held = Layout(topology, physical)
    return Named(held, layout.model, layout.group, layout.layout_version, layout.solver)
