from omni.engine.v1 import engine_pb2 as _engine_pb2
from omni.kv.v1 import kv_pb2 as _kv_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionRequest(_message.Message):
    __slots__ = ("hello", "submit", "abort", "ack")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    submit: Submit
    abort: Abort
    ack: Ack
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("welcome", "step", "rejected")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    step: StepFrame
    rejected: Rejected
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., step: _Optional[_Union[StepFrame, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("proxy_id",)
    PROXY_ID_FIELD_NUMBER: _ClassVar[int]
    proxy_id: str
    def __init__(self, proxy_id: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("worker_id", "epoch", "frame_window")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FRAME_WINDOW_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    frame_window: int
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., frame_window: _Optional[int] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("stream_id", "request_id", "model", "token_ids", "num_output_tokens", "sampling", "kv_handle", "cache_salt", "traceparent", "deadline_ms", "uncached_tokens", "adapter")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    KV_HANDLE_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    UNCACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    request_id: str
    model: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_output_tokens: int
    sampling: _engine_pb2.Sampling
    kv_handle: _kv_pb2.KvHandle
    cache_salt: str
    traceparent: str
    deadline_ms: int
    uncached_tokens: int
    adapter: str
    def __init__(self, stream_id: _Optional[int] = ..., request_id: _Optional[str] = ..., model: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., num_output_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_engine_pb2.Sampling, _Mapping]] = ..., kv_handle: _Optional[_Union[_kv_pb2.KvHandle, _Mapping]] = ..., cache_salt: _Optional[str] = ..., traceparent: _Optional[str] = ..., deadline_ms: _Optional[int] = ..., uncached_tokens: _Optional[int] = ..., adapter: _Optional[str] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("stream_ids",)
    STREAM_IDS_FIELD_NUMBER: _ClassVar[int]
    stream_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, stream_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("frame",)
    FRAME_FIELD_NUMBER: _ClassVar[int]
    frame: int
    def __init__(self, frame: _Optional[int] = ...) -> None: ...

class StepFrame(_message.Message):
    __slots__ = ("frame", "stream_ids", "counts", "token_ids", "starts", "logprobs", "finishes")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    STREAM_IDS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISHES_FIELD_NUMBER: _ClassVar[int]
    frame: int
    stream_ids: _containers.RepeatedScalarFieldContainer[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    starts: _containers.RepeatedCompositeFieldContainer[SequenceStart]
    logprobs: _containers.RepeatedCompositeFieldContainer[SequenceLogprobs]
    finishes: _containers.RepeatedCompositeFieldContainer[SequenceFinish]
    def __init__(self, frame: _Optional[int] = ..., stream_ids: _Optional[_Iterable[int]] = ..., counts: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., starts: _Optional[_Iterable[_Union[SequenceStart, _Mapping]]] = ..., logprobs: _Optional[_Iterable[_Union[SequenceLogprobs, _Mapping]]] = ..., finishes: _Optional[_Iterable[_Union[SequenceFinish, _Mapping]]] = ...) -> None: ...

class SequenceStart(_message.Message):
    __slots__ = ("stream_id", "cached_tokens", "pulled_tokens", "fell_back", "timings")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PULLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FELL_BACK_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    cached_tokens: int
    pulled_tokens: int
    fell_back: bool
    timings: _engine_pb2.Timings
    def __init__(self, stream_id: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., pulled_tokens: _Optional[int] = ..., fell_back: _Optional[bool] = ..., timings: _Optional[_Union[_engine_pb2.Timings, _Mapping]] = ...) -> None: ...

class SequenceLogprobs(_message.Message):
    __slots__ = ("stream_id", "logprobs")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    logprobs: _engine_pb2.Logprobs
    def __init__(self, stream_id: _Optional[int] = ..., logprobs: _Optional[_Union[_engine_pb2.Logprobs, _Mapping]] = ...) -> None: ...

class SequenceFinish(_message.Message):
    __slots__ = ("stream_id", "reason", "detail")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    reason: _engine_pb2.FinishReason
    detail: str
    def __init__(self, stream_id: _Optional[int] = ..., reason: _Optional[_Union[_engine_pb2.FinishReason, str]] = ..., detail: _Optional[str] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("stream_id", "code", "detail", "field")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    code: str
    detail: str
    field: str
    def __init__(self, stream_id: _Optional[int] = ..., code: _Optional[str] = ..., detail: _Optional[str] = ..., field: _Optional[str] = ...) -> None: ...
