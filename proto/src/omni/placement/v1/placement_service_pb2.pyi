from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Topology(_message.Message):
    __slots__ = ("num_layers", "num_experts", "num_ranks", "slots_per_rank")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_PER_RANK_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_experts: int
    num_ranks: int
    slots_per_rank: int
    def __init__(self, num_layers: _Optional[int] = ..., num_experts: _Optional[int] = ..., num_ranks: _Optional[int] = ..., slots_per_rank: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("model", "worker_id", "first_step", "last_step", "load")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    model: str
    worker_id: str
    first_step: int
    last_step: int
    load: ExpertLoad
    def __init__(self, model: _Optional[str] = ..., worker_id: _Optional[str] = ..., first_step: _Optional[int] = ..., last_step: _Optional[int] = ..., load: _Optional[_Union[ExpertLoad, _Mapping]] = ...) -> None: ...

class ReportLoadResponse(_message.Message):
    __slots__ = ("accepted_windows",)
    ACCEPTED_WINDOWS_FIELD_NUMBER: _ClassVar[int]
    accepted_windows: int
    def __init__(self, accepted_windows: _Optional[int] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("model", "layout_version", "topology", "physical_to_logical", "solver")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    PHYSICAL_TO_LOGICAL_FIELD_NUMBER: _ClassVar[int]
    SOLVER_FIELD_NUMBER: _ClassVar[int]
    model: str
    layout_version: int
    topology: Topology
    physical_to_logical: _containers.RepeatedScalarFieldContainer[int]
    solver: str
    def __init__(self, model: _Optional[str] = ..., layout_version: _Optional[int] = ..., topology: _Optional[_Union[Topology, _Mapping]] = ..., physical_to_logical: _Optional[_Iterable[int]] = ..., solver: _Optional[str] = ...) -> None: ...

class PlanRequest(_message.Message):
    __slots__ = ("model", "topology", "load", "solver", "publish")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    SOLVER_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_FIELD_NUMBER: _ClassVar[int]
    model: str
    topology: Topology
    load: ExpertLoad
    solver: str
    publish: bool
    def __init__(self, model: _Optional[str] = ..., topology: _Optional[_Union[Topology, _Mapping]] = ..., load: _Optional[_Union[ExpertLoad, _Mapping]] = ..., solver: _Optional[str] = ..., publish: _Optional[bool] = ...) -> None: ...

class PlanResponse(_message.Message):
    __slots__ = ("layout", "balancedness")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_FIELD_NUMBER: _ClassVar[int]
    layout: Layout
    balancedness: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, layout: _Optional[_Union[Layout, _Mapping]] = ..., balancedness: _Optional[_Iterable[float]] = ...) -> None: ...

class GetLayoutRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetLayoutResponse(_message.Message):
    __slots__ = ("layout",)
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    layout: Layout
    def __init__(self, layout: _Optional[_Union[Layout, _Mapping]] = ...) -> None: ...

class WatchLayoutsRequest(_message.Message):
    __slots__ = ("model", "after_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    AFTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    after_version: int
    def __init__(self, model: _Optional[str] = ..., after_version: _Optional[int] = ...) -> None: ...

class WatchLayoutsResponse(_message.Message):
    __slots__ = ("layout",)
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    layout: Layout
    def __init__(self, layout: _Optional[_Union[Layout, _Mapping]] = ...) -> None: ...
