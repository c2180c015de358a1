"""vLLM's KV events, read from its ZMQ publisher and turned into the port's values."""

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from omni_engine.ports import BlockEvent, BlocksCleared, BlocksRemoved, BlocksStored, EventBatch, Medium

# vLLM names the engine's own device cache GPU on every platform.
_MEDIA = {None: Medium.HBM, "GPU": Medium.HBM, "CPU": Medium.HOST, "STORAGE": Medium.DISK}
_MAX_QUEUED_BATCHES = 100_000


class VllmEvents:
    """Subscribed from construction, so nothing published later is missed."""

    def __init__(self, endpoint: str) -> None:
        from vllm.distributed.kv_events import KVEventBatch

        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, _MAX_QUEUED_BATCHES)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.connect(endpoint)

    async def __aiter__(self) -> AsyncIterator[EventBatch]:
        while True:
            _, sequence, payload = await self._socket.recv_multipart()
            batch = self._decoder.decode(payload)
            events = [e for raw in batch.events if (e := _event(raw)) is not None]
            yield EventBatch(int.from_bytes(sequence, "big"), events)

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


def _event(raw: Any) -> BlockEvent | None:
    """None for groups of a hybrid model other than the first, whose blocks do not cover the prefix."""
    if getattr(raw, "group_idx", None):
        return None
    match type(raw).__name__:
        case "BlockStored":
            return _stored(raw)
        case "BlockRemoved":
            return BlocksRemoved([_bytes(h) for h in raw.block_hashes], _MEDIA.get(raw.medium, Medium.REMOTE))
        case "AllBlocksCleared":
            return BlocksCleared()
    return None


def _stored(raw: Any) -> BlocksStored:
    extra = [key for keys in raw.extra_keys or () for key in keys or () if isinstance(key, str)]
    adapter = raw.lora_name or ""
    salts = [key for key in extra if key != adapter]
    return BlocksStored(
        block_hashes=[_bytes(h) for h in raw.block_hashes],
        parent=None if raw.parent_block_hash is None else _bytes(raw.parent_block_hash),
        token_ids=raw.token_ids,
        block_size=raw.block_size,
        medium=_MEDIA.get(raw.medium, Medium.REMOTE),
        cache_salt=salts[0] if salts else "",
        adapter=adapter,
    )


def _bytes(block_hash: bytes | int) -> bytes:
    return block_hash if isinstance(block_hash, bytes) else block_hash.to_bytes(8, "little", signed=False)
