from omni.engine.v1 import engine_pb2 as _engine_pb2
from omni.kv.v1 import kv_pb2 as _kv_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BlockAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BLOCK_ACTION_UNSPECIFIED: _ClassVar[BlockAction]
    BLOCK_ACTION_STORED: _ClassVar[BlockAction]
    BLOCK_ACTION_REMOVED: _ClassVar[BlockAction]
    BLOCK_ACTION_CLEARED: _ClassVar[BlockAction]
BLOCK_ACTION_UNSPECIFIED: BlockAction
BLOCK_ACTION_STORED: BlockAction
BLOCK_ACTION_REMOVED: BlockAction
BLOCK_ACTION_CLEARED: BlockAction

class RegisterRequest(_message.Message):
    __slots__ = ("info", "leave", "draining")
    INFO_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    info: _engine_pb2.WorkerInfo
    leave: bool
    draining: bool
    def __init__(self, info: _Optional[_Union[_engine_pb2.WorkerInfo, _Mapping]] = ..., leave: _Optional[bool] = ..., draining: _Optional[bool] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("epoch", "lease_s", "wants_snapshot")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    WANTS_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    lease_s: float
    wants_snapshot: bool
    def __init__(self, epoch: _Optional[int] = ..., lease_s: _Optional[float] = ..., wants_snapshot: _Optional[bool] = ...) -> None: ...

class BlockEvent(_message.Message):
    __slots__ = ("action", "medium", "block_keys", "span", "positions")
    ACTION_FIELD_NUMBER: _ClassVar[int]
    MEDIUM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    SPAN_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    action: BlockAction
    medium: _kv_pb2.Medium
    block_keys: bytes
    span: bytes
    positions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, action: _Optional[_Union[BlockAction, str]] = ..., medium: _Optional[_Union[_kv_pb2.Medium, str]] = ..., block_keys: _Optional[bytes] = ..., span: _Optional[bytes] = ..., positions: _Optional[_Iterable[int]] = ...) -> None: ...

class PublishBlocksRequest(_message.Message):
    __slots__ = ("worker_id", "epoch", "sequence", "snapshot", "events", "occurred_unix_ms")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    OCCURRED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    sequence: int
    snapshot: bool
    events: _containers.RepeatedCompositeFieldContainer[BlockEvent]
    occurred_unix_ms: int
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., snapshot: _Optional[bool] = ..., events: _Optional[_Iterable[_Union[BlockEvent, _Mapping]]] = ..., occurred_unix_ms: _Optional[int] = ...) -> None: ...

class PublishBlocksResponse(_message.Message):
    __slots__ = ("accepted_sequence", "wants_snapshot")
    ACCEPTED_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    WANTS_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    accepted_sequence: int
    wants_snapshot: bool
    def __init__(self, accepted_sequence: _Optional[int] = ..., wants_snapshot: _Optional[bool] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("model", "block_size", "block_keys")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    model: str
    block_size: int
    block_keys: bytes
    def __init__(self, model: _Optional[str] = ..., block_size: _Optional[int] = ..., block_keys: _Optional[bytes] = ...) -> None: ...

class PrefixMatch(_message.Message):
    __slots__ = ("worker_id", "medium", "num_blocks", "pool")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    MEDIUM_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    medium: _kv_pb2.Medium
    num_blocks: int
    pool: str
    def __init__(self, worker_id: _Optional[str] = ..., medium: _Optional[_Union[_kv_pb2.Medium, str]] = ..., num_blocks: _Optional[int] = ..., pool: _Optional[str] = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("matches", "degraded")
    MATCHES_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    matches: _containers.RepeatedCompositeFieldContainer[PrefixMatch]
    degraded: bool
    def __init__(self, matches: _Optional[_Iterable[_Union[PrefixMatch, _Mapping]]] = ..., degraded: _Optional[bool] = ...) -> None: ...

class WatchPosition(_message.Message):
    __slots__ = ("dataset", "event")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    event: int
    def __init__(self, dataset: _Optional[str] = ..., event: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("blocks", "model", "resume")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    blocks: bool
    model: str
    resume: WatchPosition
    def __init__(self, blocks: _Optional[bool] = ..., model: _Optional[str] = ..., resume: _Optional[_Union[WatchPosition, _Mapping]] = ...) -> None: ...

class WorkerChange(_message.Message):
    __slots__ = ("info", "removed", "draining")
    INFO_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    info: _engine_pb2.WorkerInfo
    removed: bool
    draining: bool
    def __init__(self, info: _Optional[_Union[_engine_pb2.WorkerInfo, _Mapping]] = ..., removed: _Optional[bool] = ..., draining: _Optional[bool] = ...) -> None: ...

class BlockChange(_message.Message):
    __slots__ = ("worker_id", "epoch", "event")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    event: BlockEvent
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., event: _Optional[_Union[BlockEvent, _Mapping]] = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("version", "snapshot", "workers", "blocks", "degraded", "position", "complete")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    version: int
    snapshot: bool
    workers: _containers.RepeatedCompositeFieldContainer[WorkerChange]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockChange]
    degraded: bool
    position: WatchPosition
    complete: bool
    def __init__(self, version: _Optional[int] = ..., snapshot: _Optional[bool] = ..., workers: _Optional[_Iterable[_Union[WorkerChange, _Mapping]]] = ..., blocks: _Optional[_Iterable[_Union[BlockChange, _Mapping]]] = ..., degraded: _Optional[bool] = ..., position: _Optional[_Union[WatchPosition, _Mapping]] = ..., complete: _Optional[bool] = ...) -> None: ...

class ListWorkersRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class WorkerState(_message.Message):
    __slots__ = ("info", "draining", "lease_left_s", "sequence", "wants_snapshot", "num_blocks")
    INFO_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    LEASE_LEFT_S_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    WANTS_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    info: _engine_pb2.WorkerInfo
    draining: bool
    lease_left_s: float
    sequence: int
    wants_snapshot: bool
    num_blocks: int
    def __init__(self, info: _Optional[_Union[_engine_pb2.WorkerInfo, _Mapping]] = ..., draining: _Optional[bool] = ..., lease_left_s: _Optional[float] = ..., sequence: _Optional[int] = ..., wants_snapshot: _Optional[bool] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class ListWorkersResponse(_message.Message):
    __slots__ = ("workers", "degraded")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerState]
    degraded: bool
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerState, _Mapping]]] = ..., degraded: _Optional[bool] = ...) -> None: ...

class ListBlocksRequest(_message.Message):
    __slots__ = ("worker_id",)
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    def __init__(self, worker_id: _Optional[str] = ...) -> None: ...

class ListBlocksResponse(_message.Message):
    __slots__ = ("epoch", "medium", "block_keys", "degraded")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MEDIUM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    medium: _kv_pb2.Medium
    block_keys: bytes
    degraded: bool
    def __init__(self, epoch: _Optional[int] = ..., medium: _Optional[_Union[_kv_pb2.Medium, str]] = ..., block_keys: _Optional[bytes] = ..., degraded: _Optional[bool] = ...) -> None: ...
