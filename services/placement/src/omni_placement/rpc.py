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
from omni_placement.metrics import Metrics
from omni_placement.planning import Planner
from omni_placement.windows import LoadBook


class PlacementServicer(PlacementServiceServicer):
    """Decodes the messages, calls planner and books, encodes the answers."""

    def __init__(self, planner: Planner, layouts: LayoutBook, loads: LoadBook, metrics: Metrics) -> None:
        self._planner, self._layouts, self._loads, self._metrics = planner, layouts, loads, metrics

    async def ReportLoad(self, requests: AsyncIterator[pb.ReportLoadRequest], context: Any) -> pb.ReportLoadResponse:
        accepted = 0
        async for request in requests:
            is_new = self._loads.add(wire.checked_model(request.model), wire.window_from_wire(request))
            self._metrics.windows.labels("accepted" if is_new else "repeated").inc()
            accepted += is_new
        return pb.ReportLoadResponse(accepted_windows=accepted)

    async def Plan(self, request: pb.PlanRequest, context: Any) -> pb.PlanResponse:
        start_s = time.perf_counter()
        plan = await self._planner.plan(wire.question_from_wire(request))
        self._metrics.plan_seconds.labels(plan.solver).observe(time.perf_counter() - start_s)
        if plan.version:
            self._metrics.layout_version.labels(plan.model).set(plan.version)
            self._metrics.balancedness.labels(plan.model).set(float(plan.balancedness.min()))
        return wire.plan_to_wire(plan)

    async def GetLayout(self, request: pb.GetLayoutRequest, context: Any) -> pb.GetLayoutResponse:
        return pb.GetLayoutResponse(layout=wire.published_to_wire(self._layouts.get(request.model)))

    async def WatchLayouts(
        self, request: pb.WatchLayoutsRequest, context: Any
    ) -> AsyncIterator[pb.WatchLayoutsResponse]:
        with self._metrics.watches.track_inprogress():
            async for published in self._layouts.watch(request.model, request.after_version):
                yield pb.WatchLayoutsResponse(layout=wire.published_to_wire(published))


def servicer(implementation: PlacementServicer) -> Servicer:
    name = pb.DESCRIPTOR.services_by_name["PlacementService"].full_name
    return Servicer(implementation, add_PlacementServiceServicer_to_server, name)
