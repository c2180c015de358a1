from omni.engine.v1 import engine_pb2 as _engine_pb2
from omni.kv.v1 import kv_pb2 as _kv_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("info",)
    INFO_FIELD_NUMBER: _ClassVar[int]
    info: _engine_pb2.WorkerInfo
    def __init__(self, info: _Optional[_Union[_engine_pb2.WorkerInfo, _Mapping]] = ...) -> None: ...

class WatchStatsRequest(_message.Message):
    __slots__ = ("min_interval_ms", "proxy_id")
    MIN_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    PROXY_ID_FIELD_NUMBER: _ClassVar[int]
    min_interval_ms: int
    proxy_id: str
    def __init__(self, min_interval_ms: _Optional[int] = ..., proxy_id: _Optional[str] = ...) -> None: ...

class WatchStatsResponse(_message.Message):
    __slots__ = ("worker_id", "epoch", "running", "waiting", "queued_tokens", "kv_usage", "leases", "step_ms", "draining", "generated_tokens", "computed_prompt_tokens", "others_prefills", "others_uncached_tokens", "others_sequences", "context_tokens", "steps", "busy_ms", "role", "prompts", "prompt_tokens", "prompt_busy_ms", "adapters")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    STEP_MS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OTHERS_PREFILLS_FIELD_NUMBER: _ClassVar[int]
    OTHERS_UNCACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OTHERS_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BUSY_MS_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_BUSY_MS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    running: int
    waiting: int
    queued_tokens: int
    kv_usage: float
    leases: int
    step_ms: float
    draining: bool
    generated_tokens: int
    computed_prompt_tokens: int
    others_prefills: int
    others_uncached_tokens: int
    others_sequences: int
    context_tokens: int
    steps: int
    busy_ms: float
    role: _engine_pb2.Role
    prompts: int
    prompt_tokens: int
    prompt_busy_ms: float
    adapters: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., kv_usage: _Optional[float] = ..., leases: _Optional[int] = ..., step_ms: _Optional[float] = ..., draining: _Optional[bool] = ..., generated_tokens: _Optional[int] = ..., computed_prompt_tokens: _Optional[int] = ..., others_prefills: _Optional[int] = ..., others_uncached_tokens: _Optional[int] = ..., others_sequences: _Optional[int] = ..., context_tokens: _Optional[int] = ..., steps: _Optional[int] = ..., busy_ms: _Optional[float] = ..., role: _Optional[_Union[_engine_pb2.Role, str]] = ..., prompts: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., prompt_busy_ms: _Optional[float] = ..., adapters: _Optional[_Iterable[str]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("resume",)
    RESUME_FIELD_NUMBER: _ClassVar[int]
    resume: bool
    def __init__(self, resume: _Optional[bool] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("drained", "running", "leases")
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    drained: bool
    running: int
    leases: int
    def __init__(self, drained: _Optional[bool] = ..., running: _Optional[int] = ..., leases: _Optional[int] = ...) -> None: ...

class SetRoleRequest(_message.Message):
    __slots__ = ("role",)
    ROLE_FIELD_NUMBER: _ClassVar[int]
    role: _engine_pb2.Role
    def __init__(self, role: _Optional[_Union[_engine_pb2.Role, str]] = ...) -> None: ...

class SetRoleResponse(_message.Message):
    __slots__ = ("role", "previous")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    role: _engine_pb2.Role
    previous: _engine_pb2.Role
    def __init__(self, role: _Optional[_Union[_engine_pb2.Role, str]] = ..., previous: _Optional[_Union[_engine_pb2.Role, str]] = ...) -> None: ...

class ListBlocksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListBlocksResponse(_message.Message):
    __slots__ = ("epoch", "medium", "block_keys")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MEDIUM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    medium: _kv_pb2.Medium
    block_keys: bytes
    def __init__(self, epoch: _Optional[int] = ..., medium: _Optional[_Union[_kv_pb2.Medium, str]] = ..., block_keys: _Optional[bytes] = ...) -> None: ...
