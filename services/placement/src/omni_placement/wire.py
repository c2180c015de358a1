"""Messages to values and back."""

from urllib.parse import quote

import numpy as np

from omni.placement.v1 import placement_service_pb2 as pb
from omni_common.errors import InvalidRequest
from omni_placement.book import Published
from omni_placement.layout import Layout, Load, Topology
from omni_placement.planning import Plan, Question
from omni_placement.windows import Window

# Names become file names.
MAX_NAME_BYTES = 240


def checked_model(model: str) -> str:
    """The name, if there is one and a file can bear it."""
    if not 0 < len(quote(model, safe="")) <= MAX_NAME_BYTES:
        raise InvalidRequest(f"model must have 1 to {MAX_NAME_BYTES} bytes, escaped as in a URL", field="model")
    return model


def load_from_wire(load: pb.ExpertLoad) -> Load:
    """Counts as int64 (layers, experts). Raises `InvalidRequest` where they are not that many or too large."""
    if load.num_layers < 1 or load.num_experts < 1 or len(load.tokens) != load.num_layers * load.num_experts:
        message = f"{len(load.tokens)} counts are not {load.num_layers} layers of {load.num_experts} experts"
        raise InvalidRequest(message, field="load.tokens")
    counts = np.array(load.tokens, dtype=np.uint64)
    # Sums over windows stay far from the end of int64.
    if (counts > 2**48).any():
        raise InvalidRequest("a count is larger than 2**48", field="load.tokens")
    return counts.astype(np.int64).reshape(load.num_layers, load.num_experts)


def window_from_wire(request: pb.ReportLoadRequest) -> Window:
    return Window(request.worker_id, request.first_step, request.last_step, load_from_wire(request.load))


def question_from_wire(request: pb.PlanRequest) -> Question:
    topology = _topology_from_wire(request.topology) if request.HasField("topology") else None
    load = load_from_wire(request.load) if request.HasField("load") else None
    return Question(checked_model(request.model), topology, load, request.solver, request.publish)


def _topology_from_wire(topology: pb.Topology) -> Topology:
    return Topology(topology.num_layers, topology.num_experts, topology.num_ranks, topology.slots_per_rank)


def plan_to_wire(plan: Plan) -> pb.PlanResponse:
    layout = _layout_to_wire(plan.model, plan.version, plan.solver, plan.layout)
    return pb.PlanResponse(layout=layout, balancedness=plan.balancedness.tolist())


def published_to_wire(published: Published) -> pb.Layout:
    return _layout_to_wire(published.model, published.version, published.solver, published.layout)


def _layout_to_wire(model: str, version: int, solver: str, layout: Layout) -> pb.Layout:
    shape = layout.topology
    topology = pb.Topology(
        num_layers=shape.num_layers,
        num_experts=shape.num_experts,
        num_ranks=shape.num_ranks,
        slots_per_rank=shape.slots_per_rank,
    )
    physical = layout.physical.ravel().tolist()
    return pb.Layout(
        model=model, layout_version=version, topology=topology, physical_to_logical=physical, solver=solver
    )
