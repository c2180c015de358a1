"""Wire edge of PlacementService."""

import time
from collections.abc import AsyncIterator
from typing import Any

from omni.placement.v1 import placement_service_pb2 as pb
from omni.placement.v1.placement_service_pb2_grpc import (
    PlacementServiceServicer,
    add_PlacementServiceServicer_to_server,
)
from omni_common.rpc import Servicer
from omni_placement import wire
from omni_placement.book import LayoutBook
from omni_placement.load.book import GroupName
from omni_placement.metrics import Metrics
from omni_placement.planning import Planner
from omni_placement.recovery import Recovery
from omni_placement.reports import Reports
from omni_placement.rollout import Rollout


class PlacementServicer(PlacementServiceServicer):
    """Decodes the messages, calls the parts of the service, encodes the answers."""

    def __init__(
        self,
        layouts: LayoutBook,
        rollout: Rollout,
        reports: Reports,
        planner: Planner,
        recovery: Recovery,
        metrics: Metrics,
    ) -> None:
        self._layouts, self._rollout, self._reports = layouts, rollout, reports
        self._planner, self._recovery, self._metrics = planner, recovery, metrics

    async def ReportLoad(self, requests: AsyncIterator[pb.ReportLoadRequest], context: Any) -> pb.ReportLoadResponse:
        accepted = 0
        async for request in requests:
            name = self._name(request)
            is_new = self._reports.take(name, wire.window_from_wire(request))
            self._metrics.windows.labels("accepted" if is_new else "repeated").inc()
            if (imbalance := self._reports.measured_imbalance(name)) is not None:
                self._metrics.measured_imbalance.labels(*name).set(imbalance)
            accepted += is_new
        return pb.ReportLoadResponse(accepted_windows=accepted)

    async def Plan(self, request: pb.PlanRequest, context: Any) -> pb.PlanResponse:
        start_s = time.perf_counter()
        plan = await self._planner.plan(wire.question_from_wire(self._name(request), request))
        self._metrics.plan_seconds.labels(plan.solver).observe(time.perf_counter() - start_s)
        return wire.plan_to_wire(plan)

    async def GetLayout(self, request: pb.GetLayoutRequest, context: Any) -> pb.GetLayoutResponse:
        history = self._layouts.history(self._name(request))
        status = wire.status_to_wire(history, self._rollout.session(history.name))
        return pb.GetLayoutResponse(layout=wire.published_to_wire(history.in_force), status=status)

    async def WatchLayouts(
        self, request: pb.WatchLayoutsRequest, context: Any
    ) -> AsyncIterator[pb.WatchLayoutsResponse]:
        with self._metrics.watches.track_inprogress():
            if not request.HasField("held"):
                async for published in self._layouts.watch(request.model, request.group, request.after_version):
                    failed = sorted(self._layouts.exclusions(published.name).silent)
                    yield pb.WatchLayoutsResponse(layout=wire.published_to_wire(published), excluded_ranks=failed)
                return
            name = GroupName(*wire.checked_names(request.model, request.group))
            held, is_fresh = wire.held_from_wire(request), request.held.layout_version == 0
            session = await self._rollout.attach(name, request.worker_id, held, is_fresh=is_fresh)
            try:
                async for order in session.orders():
                    yield wire.order_to_wire(order)
            finally:
                self._rollout.detach(session)

    async def AckLayout(self, request: pb.AckLayoutRequest, context: Any) -> pb.AckLayoutResponse:
        await self._recovery.ack(wire.ack_from_wire(self._name(request), request))
        return pb.AckLayoutResponse()

    async def ListLayouts(self, request: pb.ListLayoutsRequest, context: Any) -> pb.ListLayoutsResponse:
        newest_first = self._layouts.history(self._name(request)).layouts[::-1]
        kept = newest_first[: request.limit or None]
        return pb.ListLayoutsResponse(records=[wire.record_to_wire(published) for published in kept])

    async def Rollback(self, request: pb.RollbackRequest, context: Any) -> pb.RollbackResponse:
        published = await self._recovery.rollback(self._name(request), request.to_version)
        return pb.RollbackResponse(layout=wire.published_to_wire(published))

    async def SetRanks(self, request: pb.SetRanksRequest, context: Any) -> pb.SetRanksResponse:
        published = await self._recovery.set_ranks(self._name(request), frozenset(request.excluded_ranks))
        return pb.SetRanksResponse(layout=wire.published_to_wire(published))

    async def GetLoad(self, request: pb.GetLoadRequest, context: Any) -> pb.GetLoadResponse:
        return wire.summary_to_wire(self._reports.summary(self._name(request)))

    async def ListGroups(self, request: pb.ListGroupsRequest, context: Any) -> pb.ListGroupsResponse:
        groups = [
            wire.status_to_wire(self._layouts.history(name), self._rollout.session(name))
            for name in self._layouts.names()
        ]
        return pb.ListGroupsResponse(groups=groups)

    def _name(self, request: Any) -> GroupName:
        return self._rollout.resolve(*wire.checked_names(request.model, request.group))


def servicer(implementation: PlacementServicer) -> Servicer:
    name = pb.DESCRIPTOR.services_by_name["PlacementService"].full_name
    return Servicer(implementation, add_PlacementServiceServicer_to_server, name)
