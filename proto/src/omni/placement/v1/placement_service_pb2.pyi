from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_PREFILL: _ClassVar[Phase]
    PHASE_DECODE: _ClassVar[Phase]

class MigrationOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MIGRATION_OUTCOME_UNSPECIFIED: _ClassVar[MigrationOutcome]
    MIGRATION_OUTCOME_APPLYING: _ClassVar[MigrationOutcome]
    MIGRATION_OUTCOME_APPLIED: _ClassVar[MigrationOutcome]
    MIGRATION_OUTCOME_FAILED: _ClassVar[MigrationOutcome]
PHASE_UNSPECIFIED: Phase
PHASE_PREFILL: Phase
PHASE_DECODE: Phase
MIGRATION_OUTCOME_UNSPECIFIED: MigrationOutcome
MIGRATION_OUTCOME_APPLYING: MigrationOutcome
MIGRATION_OUTCOME_APPLIED: MigrationOutcome
MIGRATION_OUTCOME_FAILED: MigrationOutcome

class Topology(_message.Message):
    __slots__ = ("num_layers", "num_experts", "num_ranks", "slots_per_rank", "ranks_per_host", "rank_slots", "shared_ranks", "num_groups", "expert_bytes")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_PER_RANK_FIELD_NUMBER: _ClassVar[int]
    RANKS_PER_HOST_FIELD_NUMBER: _ClassVar[int]
    RANK_SLOTS_FIELD_NUMBER: _ClassVar[int]
    SHARED_RANKS_FIELD_NUMBER: _ClassVar[int]
    NUM_GROUPS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_experts: int
    num_ranks: int
    slots_per_rank: int
    ranks_per_host: int
    rank_slots: _containers.RepeatedScalarFieldContainer[int]
    shared_ranks: _containers.RepeatedScalarFieldContainer[int]
    num_groups: int
    expert_bytes: int
    def __init__(self, num_layers: _Optional[int] = ..., num_experts: _Optional[int] = ..., num_ranks: _Optional[int] = ..., slots_per_rank: _Optional[int] = ..., ranks_per_host: _Optional[int] = ..., rank_slots: _Optional[_Iterable[int]] = ..., shared_ranks: _Optional[_Iterable[int]] = ..., num_groups: _Optional[int] = ..., expert_bytes: _Optional[int] = ...) -> None: ...

class ExpertLoad(_message.Message):
    __slots__ = ("num_layers", "num_experts", "tokens")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_experts: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, num_layers: _Optional[int] = ..., num_experts: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class ReportLoadRequest(_message.Message):
    __slots__ = ("model", "worker_id", "first_step", "last_step", "load", "group", "phase", "traffic_class", "layout_version", "tokens", "duration_ms", "rank_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_CLASS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    RANK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    worker_id: str
    first_step: int
    last_step: int
    load: ExpertLoad
    group: str
    phase: Phase
    traffic_class: str
    layout_version: int
    tokens: int
    duration_ms: float
    rank_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model: _Optional[str] = ..., worker_id: _Optional[str] = ..., first_step: _Optional[int] = ..., last_step: _Optional[int] = ..., load: _Optional[_Union[ExpertLoad, _Mapping]] = ..., group: _Optional[str] = ..., phase: _Optional[_Union[Phase, str]] = ..., traffic_class: _Optional[str] = ..., layout_version: _Optional[int] = ..., tokens: _Optional[int] = ..., duration_ms: _Optional[float] = ..., rank_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class ReportLoadResponse(_message.Message):
    __slots__ = ("accepted_windows",)
    ACCEPTED_WINDOWS_FIELD_NUMBER: _ClassVar[int]
    accepted_windows: int
    def __init__(self, accepted_windows: _Optional[int] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("model", "layout_version", "topology", "physical_to_logical", "solver", "group")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    PHYSICAL_TO_LOGICAL_FIELD_NUMBER: _ClassVar[int]
    SOLVER_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    model: str
    layout_version: int
    topology: Topology
    physical_to_logical: _containers.RepeatedScalarFieldContainer[int]
    solver: str
    group: str
    def __init__(self, model: _Optional[str] = ..., layout_version: _Optional[int] = ..., topology: _Optional[_Union[Topology, _Mapping]] = ..., physical_to_logical: _Optional[_Iterable[int]] = ..., solver: _Optional[str] = ..., group: _Optional[str] = ...) -> None: ...

class Pin(_message.Message):
    __slots__ = ("layer", "expert", "rank")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    rank: int
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., rank: _Optional[int] = ...) -> None: ...

class PlanRequest(_message.Message):
    __slots__ = ("model", "topology", "load", "solver", "publish", "group", "budget", "excluded_ranks", "pins", "max_replicas", "exact")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    SOLVER_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_RANKS_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    MAX_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    model: str
    topology: Topology
    load: ExpertLoad
    solver: str
    publish: bool
    group: str
    budget: int
    excluded_ranks: _containers.RepeatedScalarFieldContainer[int]
    pins: _containers.RepeatedCompositeFieldContainer[Pin]
    max_replicas: int
    exact: Layout
    def __init__(self, model: _Optional[str] = ..., topology: _Optional[_Union[Topology, _Mapping]] = ..., load: _Optional[_Union[ExpertLoad, _Mapping]] = ..., solver: _Optional[str] = ..., publish: _Optional[bool] = ..., group: _Optional[str] = ..., budget: _Optional[int] = ..., excluded_ranks: _Optional[_Iterable[int]] = ..., pins: _Optional[_Iterable[_Union[Pin, _Mapping]]] = ..., max_replicas: _Optional[int] = ..., exact: _Optional[_Union[Layout, _Mapping]] = ...) -> None: ...

class PlanResponse(_message.Message):
    __slots__ = ("layout", "balancedness", "predicted_step_load", "current_step_load", "lower_bound", "moved_bytes", "num_rounds", "decision")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_STEP_LOAD_FIELD_NUMBER: _ClassVar[int]
    CURRENT_STEP_LOAD_FIELD_NUMBER: _ClassVar[int]
    LOWER_BOUND_FIELD_NUMBER: _ClassVar[int]
    MOVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    layout: Layout
    balancedness: _containers.RepeatedScalarFieldContainer[float]
    predicted_step_load: float
    current_step_load: float
    lower_bound: _containers.RepeatedScalarFieldContainer[float]
    moved_bytes: int
    num_rounds: int
    decision: Decision
    def __init__(self, layout: _Optional[_Union[Layout, _Mapping]] = ..., balancedness: _Optional[_Iterable[float]] = ..., predicted_step_load: _Optional[float] = ..., current_step_load: _Optional[float] = ..., lower_bound: _Optional[_Iterable[float]] = ..., moved_bytes: _Optional[int] = ..., num_rounds: _Optional[int] = ..., decision: _Optional[_Union[Decision, _Mapping]] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("publish", "reason", "gain_ms", "cost_ms", "risk_ms", "ms_per_token")
    PUBLISH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    GAIN_MS_FIELD_NUMBER: _ClassVar[int]
    COST_MS_FIELD_NUMBER: _ClassVar[int]
    RISK_MS_FIELD_NUMBER: _ClassVar[int]
    MS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    publish: bool
    reason: str
    gain_ms: float
    cost_ms: float
    risk_ms: float
    ms_per_token: float
    def __init__(self, publish: _Optional[bool] = ..., reason: _Optional[str] = ..., gain_ms: _Optional[float] = ..., cost_ms: _Optional[float] = ..., risk_ms: _Optional[float] = ..., ms_per_token: _Optional[float] = ...) -> None: ...

class GetLayoutRequest(_message.Message):
    __slots__ = ("model", "group")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    model: str
    group: str
    def __init__(self, model: _Optional[str] = ..., group: _Optional[str] = ...) -> None: ...

class GetLayoutResponse(_message.Message):
    __slots__ = ("layout", "status")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    layout: Layout
    status: GroupStatus
    def __init__(self, layout: _Optional[_Union[Layout, _Mapping]] = ..., status: _Optional[_Union[GroupStatus, _Mapping]] = ...) -> None: ...

class GroupStatus(_message.Message):
    __slots__ = ("model", "group", "layout_version", "worker_id", "applied_version", "migration_id", "rounds_done", "num_rounds", "excluded_ranks")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    APPLIED_VERSION_FIELD_NUMBER: _ClassVar[int]
    MIGRATION_ID_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_DONE_FIELD_NUMBER: _ClassVar[int]
    NUM_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_RANKS_FIELD_NUMBER: _ClassVar[int]
    model: str
    group: str
    layout_version: int
    worker_id: str
    applied_version: int
    migration_id: str
    rounds_done: int
    num_rounds: int
    excluded_ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model: _Optional[str] = ..., group: _Optional[str] = ..., layout_version: _Optional[int] = ..., worker_id: _Optional[str] = ..., applied_version: _Optional[int] = ..., migration_id: _Optional[str] = ..., rounds_done: _Optional[int] = ..., num_rounds: _Optional[int] = ..., excluded_ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class WatchLayoutsRequest(_message.Message):
    __slots__ = ("model", "after_version", "group", "worker_id", "held")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    AFTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    model: str
    after_version: int
    group: str
    worker_id: str
    held: Layout
    def __init__(self, model: _Optional[str] = ..., after_version: _Optional[int] = ..., group: _Optional[str] = ..., worker_id: _Optional[str] = ..., held: _Optional[_Union[Layout, _Mapping]] = ...) -> None: ...

class WatchLayoutsResponse(_message.Message):
    __slots__ = ("layout", "rounds", "migration_id", "excluded_ranks")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    MIGRATION_ID_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_RANKS_FIELD_NUMBER: _ClassVar[int]
    layout: Layout
    rounds: _containers.RepeatedCompositeFieldContainer[MigrationRound]
    migration_id: str
    excluded_ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layout: _Optional[_Union[Layout, _Mapping]] = ..., rounds: _Optional[_Iterable[_Union[MigrationRound, _Mapping]]] = ..., migration_id: _Optional[str] = ..., excluded_ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class MigrationRound(_message.Message):
    __slots__ = ("moves", "drops")
    MOVES_FIELD_NUMBER: _ClassVar[int]
    DROPS_FIELD_NUMBER: _ClassVar[int]
    moves: _containers.RepeatedCompositeFieldContainer[ExpertMove]
    drops: _containers.RepeatedCompositeFieldContainer[ExpertSlot]
    def __init__(self, moves: _Optional[_Iterable[_Union[ExpertMove, _Mapping]]] = ..., drops: _Optional[_Iterable[_Union[ExpertSlot, _Mapping]]] = ...) -> None: ...

class ExpertMove(_message.Message):
    __slots__ = ("layer", "expert", "source_rank", "source_slot", "target_rank", "target_slot")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_RANK_FIELD_NUMBER: _ClassVar[int]
    SOURCE_SLOT_FIELD_NUMBER: _ClassVar[int]
    TARGET_RANK_FIELD_NUMBER: _ClassVar[int]
    TARGET_SLOT_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    source_rank: int
    source_slot: int
    target_rank: int
    target_slot: int
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., source_rank: _Optional[int] = ..., source_slot: _Optional[int] = ..., target_rank: _Optional[int] = ..., target_slot: _Optional[int] = ...) -> None: ...

class ExpertSlot(_message.Message):
    __slots__ = ("layer", "rank", "slot")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    layer: int
    rank: int
    slot: int
    def __init__(self, layer: _Optional[int] = ..., rank: _Optional[int] = ..., slot: _Optional[int] = ...) -> None: ...

class AckLayoutRequest(_message.Message):
    __slots__ = ("model", "group", "worker_id", "layout_version", "migration_id", "rounds_done", "outcome", "failed_ranks", "detail")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_VERSION_FIELD_NUMBER: _ClassVar[int]
    MIGRATION_ID_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_DONE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    FAILED_RANKS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    model: str
    group: str
    worker_id: str
    layout_version: int
    migration_id: str
    rounds_done: int
    outcome: MigrationOutcome
    failed_ranks: _containers.RepeatedScalarFieldContainer[int]
    detail: str
    def __init__(self, model: _Optional[str] = ..., group: _Optional[str] = ..., worker_id: _Optional[str] = ..., layout_version: _Optional[int] = ..., migration_id: _Optional[str] = ..., rounds_done: _Optional[int] = ..., outcome: _Optional[_Union[MigrationOutcome, str]] = ..., failed_ranks: _Optional[_Iterable[int]] = ..., detail: _Optional[str] = ...) -> None: ...

class AckLayoutResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListLayoutsRequest(_message.Message):
    __slots__ = ("model", "group", "limit")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    model: str
    group: str
    limit: int
    def __init__(self, model: _Optional[str] = ..., group: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class ListLayoutsResponse(_message.Message):
    __slots__ = ("records",)
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[LayoutRecord]
    def __init__(self, records: _Optional[_Iterable[_Union[LayoutRecord, _Mapping]]] = ...) -> None: ...

class LayoutRecord(_message.Message):
    __slots__ = ("layout", "published_unix_ms", "reason", "outcome")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    layout: Layout
    published_unix_ms: int
    reason: str
    outcome: MigrationOutcome
    def __init__(self, layout: _Optional[_Union[Layout, _Mapping]] = ..., published_unix_ms: _Optional[int] = ..., reason: _Optional[str] = ..., outcome: _Optional[_Union[MigrationOutcome, str]] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("model", "group", "to_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    TO_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    group: str
    to_version: int
    def __init__(self, model: _Optional[str] = ..., group: _Optional[str] = ..., to_version: _Optional[int] = ...) -> None: ...

class RollbackResponse(_message.Message):
    __slots__ = ("layout",)
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    layout: Layout
    def __init__(self, layout: _Optional[_Union[Layout, _Mapping]] = ...) -> None: ...

class SetRanksRequest(_message.Message):
    __slots__ = ("model", "group", "excluded_ranks")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_RANKS_FIELD_NUMBER: _ClassVar[int]
    model: str
    group: str
    excluded_ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model: _Optional[str] = ..., group: _Optional[str] = ..., excluded_ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class SetRanksResponse(_message.Message):
    __slots__ = ("layout",)
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    layout: Layout
    def __init__(self, layout: _Optional[_Union[Layout, _Mapping]] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ("model", "group")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    model: str
    group: str
    def __init__(self, model: _Optional[str] = ..., group: _Optional[str] = ...) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("loads", "forecast", "spread", "forecast_error", "drift", "measured_imbalance", "predicted_imbalance")
    LOADS_FIELD_NUMBER: _ClassVar[int]
    FORECAST_FIELD_NUMBER: _ClassVar[int]
    SPREAD_FIELD_NUMBER: _ClassVar[int]
    FORECAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    MEASURED_IMBALANCE_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_IMBALANCE_FIELD_NUMBER: _ClassVar[int]
    loads: _containers.RepeatedCompositeFieldContainer[ReportedLoad]
    forecast: _containers.RepeatedScalarFieldContainer[float]
    spread: _containers.RepeatedScalarFieldContainer[float]
    forecast_error: float
    drift: float
    measured_imbalance: float
    predicted_imbalance: float
    def __init__(self, loads: _Optional[_Iterable[_Union[ReportedLoad, _Mapping]]] = ..., forecast: _Optional[_Iterable[float]] = ..., spread: _Optional[_Iterable[float]] = ..., forecast_error: _Optional[float] = ..., drift: _Optional[float] = ..., measured_imbalance: _Optional[float] = ..., predicted_imbalance: _Optional[float] = ...) -> None: ...

class ReportedLoad(_message.Message):
    __slots__ = ("phase", "traffic_class", "load", "windows", "age_ms")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_CLASS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    phase: Phase
    traffic_class: str
    load: ExpertLoad
    windows: int
    age_ms: int
    def __init__(self, phase: _Optional[_Union[Phase, str]] = ..., traffic_class: _Optional[str] = ..., load: _Optional[_Union[ExpertLoad, _Mapping]] = ..., windows: _Optional[int] = ..., age_ms: _Optional[int] = ...) -> None: ...

class ListGroupsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListGroupsResponse(_message.Message):
    __slots__ = ("groups",)
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[GroupStatus]
    def __init__(self, groups: _Optional[_Iterable[_Union[GroupStatus, _Mapping]]] = ...) -> None: ...
