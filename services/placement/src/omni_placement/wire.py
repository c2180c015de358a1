"""Messages to values and back."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from omni.placement.v1 import placement_service_pb2 as pb
from omni_common.errors import InvalidRequest
from omni_placement.book import History, Outcome, Published
from omni_placement.files import file_stem
from omni_placement.layout import Layout, Numbers, Topology
from omni_placement.load import Phase, Window
from omni_placement.load.book import GroupName, StreamLoad
from omni_placement.migration import Round
from omni_placement.planning import Plan, Question
from omni_placement.reports import LoadSummary
from omni_placement.session import Ack, Order, Session

# Names become file names.
MAX_NAME_BYTES = 240
# Sums over windows stay far from the end of int64.
MAX_COUNT = 2**48
MAX_SOLVER_CHARS = 64
_SOLVED_BY = ("topology", "budget", "excluded_ranks", "pins", "max_replicas")

_PHASES = {pb.PHASE_UNSPECIFIED: Phase.MIXED, pb.PHASE_PREFILL: Phase.PREFILL, pb.PHASE_DECODE: Phase.DECODE}
PHASES_TO_WIRE = {phase: wire for wire, phase in _PHASES.items()}
_OUTCOMES = {
    pb.MIGRATION_OUTCOME_UNSPECIFIED: Outcome.NONE,
    pb.MIGRATION_OUTCOME_APPLYING: Outcome.APPLYING,
    pb.MIGRATION_OUTCOME_APPLIED: Outcome.APPLIED,
    pb.MIGRATION_OUTCOME_FAILED: Outcome.FAILED,
}
_OUTCOMES_TO_WIRE = {outcome: wire for wire, outcome in _OUTCOMES.items()}


def checked_names(model: str, group: str) -> tuple[str, str]:
    """Both, if there is a model and a file can bear the names."""
    if not model:
        raise InvalidRequest("model must be named", field="model")
    if len(file_stem(model, group)) > MAX_NAME_BYTES:
        message = f"model and group have more than {MAX_NAME_BYTES} bytes together, escaped as in a URL"
        raise InvalidRequest(message, field="group" if group else "model")
    return model, group


def window_from_wire(request: pb.ReportLoadRequest) -> Window:
    if request.phase not in _PHASES:
        raise InvalidRequest(f"no phase {request.phase}", field="phase")
    if not 0 <= request.duration_ms < float("inf"):
        raise InvalidRequest("duration_ms must be a time", field="duration_ms")
    tokens = _load_from_wire(request.load)
    ranks = None
    if request.rank_tokens:
        if len(request.rank_tokens) % len(tokens):
            message = f"{len(request.rank_tokens)} counts are not {len(tokens)} layers of ranks"
            raise InvalidRequest(message, field="rank_tokens")
        ranks = _counts(request.rank_tokens, "rank_tokens").reshape(len(tokens), -1)
    return Window(
        request.worker_id,
        request.first_step,
        request.last_step,
        tokens,
        _PHASES[request.phase],
        request.traffic_class,
        request.layout_version,
        request.duration_ms,
        ranks,
    )


def question_from_wire(name: GroupName, request: pb.PlanRequest) -> Question:
    if request.HasField("exact"):
        return _exact_from_wire(name, request)
    return Question(
        name,
        topology_from_wire(request.topology) if request.HasField("topology") else None,
        _load_from_wire(request.load).astype(np.float64) if request.HasField("load") else None,
        request.solver,
        request.publish,
        request.budget if request.HasField("budget") else None,
        frozenset(request.excluded_ranks),
        tuple((pin.layer, pin.expert, pin.rank) for pin in request.pins),
        request.max_replicas,
    )


def _exact_from_wire(name: GroupName, request: pb.PlanRequest) -> Question:
    """Raises `InvalidRequest` where there is something besides the layout to go by, or it is none."""
    for field in _SOLVED_BY:
        if request.HasField(field) if field in ("topology", "budget") else getattr(request, field):
            raise InvalidRequest(f"with an exact layout there is no {field} to give", field=field)
    if len(request.solver) > MAX_SOLVER_CHARS:
        raise InvalidRequest(f"solver has more than {MAX_SOLVER_CHARS} characters", field="solver")
    load = _load_from_wire(request.load).astype(np.float64) if request.HasField("load") else None
    layout = _layout_from_wire(request.exact, "exact")
    return Question(name, load=load, solver=request.solver, publish=request.publish, exact=layout)


def held_from_wire(request: pb.WatchLayoutsRequest) -> Layout:
    """What a worker's ranks hold. Raises `InvalidRequest` where that is no layout or the worker has no name."""
    if not request.worker_id:
        raise InvalidRequest("a worker that says what it holds must name itself", field="worker_id")
    return _layout_from_wire(request.held, "held")


def ack_from_wire(name: GroupName, request: pb.AckLayoutRequest) -> Ack:
    if (outcome := _OUTCOMES.get(request.outcome, Outcome.NONE)) is Outcome.NONE:
        raise InvalidRequest("outcome must be APPLYING, APPLIED or FAILED", field="outcome")
    if request.failed_ranks and outcome is not Outcome.FAILED:
        raise InvalidRequest("ranks fail only with outcome FAILED", field="failed_ranks")
    return Ack(
        name,
        request.worker_id,
        request.layout_version,
        request.migration_id,
        request.rounds_done,
        outcome,
        frozenset(request.failed_ranks),
        request.detail[:MAX_NAME_BYTES],
    )


def plan_to_wire(plan: Plan) -> pb.PlanResponse:
    response = pb.PlanResponse(
        layout=_layout_to_wire(plan.name, plan.version, plan.solver, plan.layout),
        balancedness=plan.balancedness.tolist(),
        predicted_step_load=plan.step_load,
        current_step_load=plan.current_step_load,
        lower_bound=plan.lower_bound.tolist(),
        moved_bytes=plan.moved_bytes,
        num_rounds=plan.num_rounds,
    )
    if plan.decision is not None:
        response.decision.publish = plan.decision.publish
        response.decision.reason = plan.decision.reason.value
        response.decision.gain_ms = plan.decision.gain_ms
        response.decision.cost_ms = plan.decision.cost_ms
        response.decision.risk_ms = plan.decision.risk_ms
        response.decision.ms_per_token = plan.decision.ms_per_token
    return response


def published_to_wire(published: Published) -> pb.Layout:
    return _layout_to_wire(published.name, published.version, published.solver, published.layout)


def order_to_wire(order: Order) -> pb.WatchLayoutsResponse:
    return pb.WatchLayoutsResponse(
        layout=published_to_wire(order.published),
        rounds=[_round_to_wire(step) for step in order.rounds],
        migration_id=order.migration_id,
        excluded_ranks=sorted(order.failed_ranks),
    )


def record_to_wire(published: Published) -> pb.LayoutRecord:
    return pb.LayoutRecord(
        layout=published_to_wire(published),
        published_unix_ms=int(published.published_at_s * 1000),
        reason=published.reason,
        outcome=_OUTCOMES_TO_WIRE[published.outcome],
    )


def status_to_wire(history: History, session: Session | None) -> pb.GroupStatus:
    applied = (p.version for p in reversed(history.layouts) if p.outcome is Outcome.APPLIED)
    status = pb.GroupStatus(
        model=history.name.model,
        group=history.name.group,
        layout_version=history.in_force.version,
        applied_version=next(applied, 0),
        excluded_ranks=sorted(history.exclusions.ranks),
    )
    if session is not None:
        status.worker_id = session.worker_id
        if session.order is not None:
            status.migration_id = session.order.migration_id
            status.rounds_done, status.num_rounds = session.rounds_done, len(session.order.rounds)
    return status


def summary_to_wire(summary: LoadSummary) -> pb.GetLoadResponse:
    response = pb.GetLoadResponse(
        loads=[_stream_to_wire(stream) for stream in summary.streams],
        drift=summary.drift.distance,
        measured_imbalance=summary.measured_imbalance or 0.0,
        predicted_imbalance=summary.predicted_imbalance or 0.0,
    )
    if summary.forecast is not None:
        response.forecast.extend(summary.forecast.load.ravel().tolist())
        response.spread.extend(summary.forecast.spread.ravel().tolist())
        response.forecast_error = summary.forecast.error or 0.0
    return response


def _stream_to_wire(load: StreamLoad) -> pb.ReportedLoad:
    layers, experts = load.tokens.shape
    return pb.ReportedLoad(
        phase=PHASES_TO_WIRE[load.stream.phase],
        traffic_class=load.stream.traffic_class,
        load=pb.ExpertLoad(num_layers=layers, num_experts=experts, tokens=load.tokens.ravel().tolist()),
        windows=load.windows,
        age_ms=int(load.age_s * 1000),
    )


def _round_to_wire(step: Round) -> pb.MigrationRound:
    moves = [
        pb.ExpertMove(
            layer=m.layer,
            expert=m.expert,
            source_rank=m.source_rank,
            source_slot=m.source_slot,
            target_rank=m.target_rank,
            target_slot=m.target_slot,
        )
        for m in step.moves
    ]
    return pb.MigrationRound(
        moves=moves, drops=[pb.ExpertSlot(layer=d.layer, rank=d.rank, slot=d.slot) for d in step.drops]
    )


def _load_from_wire(load: pb.ExpertLoad) -> Numbers:
    """Counts as int64 (layers, experts). Raises `InvalidRequest` where they are not that many or too large."""
    if load.num_layers < 1 or load.num_experts < 1 or len(load.tokens) != load.num_layers * load.num_experts:
        message = f"{len(load.tokens)} counts are not {load.num_layers} layers of {load.num_experts} experts"
        raise InvalidRequest(message, field="load.tokens")
    return _counts(load.tokens, "load.tokens").reshape(load.num_layers, load.num_experts)


def _counts(values: Iterable[int], field: str) -> npt.NDArray[np.int64]:
    counts = np.fromiter(values, dtype=np.uint64)
    if (counts > MAX_COUNT).any():
        raise InvalidRequest("a count is larger than 2**48", field=field)
    return counts.astype(np.int64)


def topology_from_wire(topology: pb.Topology) -> Topology:
    return Topology(
        topology.num_layers,
        topology.num_experts,
        topology.num_ranks,
        topology.slots_per_rank,
        topology.ranks_per_host,
        tuple(topology.rank_slots),
        tuple(topology.shared_ranks),
        topology.num_groups or 1,
        topology.expert_bytes,
    )


def topology_to_wire(topology: Topology) -> pb.Topology:
    return pb.Topology(
        num_layers=topology.num_layers,
        num_experts=topology.num_experts,
        num_ranks=topology.num_ranks,
        slots_per_rank=topology.slots_per_rank,
        ranks_per_host=topology.ranks_per_host,
        rank_slots=topology.rank_slots,
        shared_ranks=topology.shared_ranks,
        num_groups=topology.num_groups,
        expert_bytes=topology.expert_bytes,
    )


def _layout_from_wire(layout: pb.Layout, field: str) -> Layout:
    topology = topology_from_wire(layout.topology)
    slots = np.array(layout.physical_to_logical, dtype=np.int32)
    if len(slots) != np.prod(topology.shape):
        message = f"{len(slots)} slots are not {topology.shape}"
        raise InvalidRequest(message, field=f"{field}.physical_to_logical", reason="invalid_layout")
    return Layout(topology, slots.reshape(topology.shape))


def _layout_to_wire(name: GroupName, version: int, solver: str, layout: Layout) -> pb.Layout:
    return pb.Layout(
        model=name.model,
        group=name.group,
        layout_version=version,
        topology=topology_to_wire(layout.topology),
        physical_to_logical=layout.physical.ravel().tolist(),
        solver=solver,
    )
