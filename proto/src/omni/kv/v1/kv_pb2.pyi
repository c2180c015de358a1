from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Medium(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MEDIUM_UNSPECIFIED: _ClassVar[Medium]
    MEDIUM_HBM: _ClassVar[Medium]
    MEDIUM_HOST: _ClassVar[Medium]
    MEDIUM_DISK: _ClassVar[Medium]
    MEDIUM_REMOTE: _ClassVar[Medium]
MEDIUM_UNSPECIFIED: Medium
MEDIUM_HBM: Medium
MEDIUM_HOST: Medium
MEDIUM_DISK: Medium
MEDIUM_REMOTE: Medium

class KvHandle(_message.Message):
    __slots__ = ("opaque", "engine_id", "lease_id", "num_tokens", "num_blocks", "lease_s", "block_size", "lease_ends_unix_ms")
    OPAQUE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    LEASE_ENDS_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    opaque: bytes
    engine_id: str
    lease_id: str
    num_tokens: int
    num_blocks: int
    lease_s: float
    block_size: int
    lease_ends_unix_ms: int
    def __init__(self, opaque: _Optional[bytes] = ..., engine_id: _Optional[str] = ..., lease_id: _Optional[str] = ..., num_tokens: _Optional[int] = ..., num_blocks: _Optional[int] = ..., lease_s: _Optional[float] = ..., block_size: _Optional[int] = ..., lease_ends_unix_ms: _Optional[int] = ...) -> None: ...
