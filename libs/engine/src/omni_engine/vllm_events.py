"""vLLM's KV events as values of the port. Pure: bytes in, batches out.

Read with structures of our own, so that an event of another shape costs itself and not its batch.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from omni_common.blocks import block_extra
from omni_engine.ports import BlockEvent, BlocksCleared, BlocksRemoved, BlocksStored, EventBatch, Medium

log = logging.getLogger(__name__)

# vLLM names the engine's own device cache GPU on every platform.
_MEDIA = {"GPU": Medium.HBM, "CPU": Medium.HOST, "STORAGE": Medium.DISK}
# Of these layers a prefix needs every block; of the others (windows, states) only the last ones or none.
_PREFIX_KINDS = frozenset({"full_attention", "mla_attention", "sink_full_attention"})
_MAX_LOGGED = 100


_BlockHash = bytes | Annotated[int, msgspec.Meta(ge=0)]


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[msgspec.Raw]


class _Kind(msgspec.Struct):
    type: str = ""


class _Event(msgspec.Struct):
    """The fields we read of vLLM's `BlockStored`, `BlockRemoved` and `AllBlocksCleared`."""

    type: str
    block_hashes: list[_BlockHash] = []
    parent_block_hash: _BlockHash | None = None
    token_ids: list[int] = []
    block_size: int = 0
    lora_id: int | None = None
    lora_name: str | None = None
    medium: str | None = None
    locality: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None


class KvGroups:
    """Which of an engine's groups of layers a prefix needs, and what their blocks measure.

    `metadata` is vLLM's own: `group_idx`, `kind` and `block_size` of each group.
    """

    def __init__(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        needed = [group for group in metadata if group["kind"] in _PREFIX_KINDS]
        self._numbers = {group["group_idx"]: number for number, group in enumerate(needed)}
        self._is_only_one = len(metadata) == 1
        self.block_size: int | None = needed[0]["block_size"] if needed else None
        if len(needed) < len(metadata):
            log.warning(
                "block events of some layers are left out: a prefix does not need all of their blocks",
                extra={"kinds": [group["kind"] for group in metadata], "indexed": len(needed)},
            )

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, group_idx: int | None) -> int | None:
        """The group's number among those a prefix needs; None if it is not one."""
        if group_idx is None:
            return 0 if self._is_only_one and self._numbers else None
        return self._numbers.get(group_idx)


class EventReader:
    """Batches of one engine. What it cannot place is counted, logged once for each shape, and never guessed.

    What cannot be read at all may have told of removals, and counts as a clearing.
    """

    def __init__(self, groups: KvGroups) -> None:
        self._groups = groups
        self._batches = msgspec.msgpack.Decoder(_Batch)
        self._events = msgspec.msgpack.Decoder(_Event)
        self._logged: set[tuple[str, str]] = set()

    def read(self, sequence: int, payload: bytes, is_replayed: bool = False) -> EventBatch:
        skipped: Counter[str] = Counter()
        try:
            batch = self._batches.decode(payload)
        except msgspec.DecodeError as error:
            self._skip(skipped, "unreadable", str(error))
            return EventBatch(sequence, [BlocksCleared()], 0, skipped, is_replayed)
        events = [event for raw in batch.events if (event := self._event(raw, skipped)) is not None]
        return EventBatch(sequence, events, int(batch.ts * 1e3), skipped, is_replayed)

    def _event(self, raw: msgspec.Raw, skipped: Counter[str]) -> BlockEvent | None:
        try:
            event = self._events.decode(raw)
        except msgspec.DecodeError as error:
            self._skip(skipped, "unreadable", str(error))
            return None if _kind(raw) == "BlockStored" else BlocksCleared()
        match event.type:
            case "BlockStored" | "BlockRemoved":
                return self._placed(event, skipped)
            case "AllBlocksCleared":
                return BlocksCleared()
        self._skip(skipped, "unreadable", event.type)
        return BlocksCleared()

    def _placed(self, event: _Event, skipped: Counter[str]) -> BlocksStored | BlocksRemoved | None:
        """None where the layers do not matter or the place is not one we know."""
        count = len(event.block_hashes)
        group = self._groups.number(event.group_idx)
        if group is None:
            skipped["group"] += count
            return None
        medium = _medium(event)
        if medium is None:
            self._skip(skipped, "medium", f"{event.medium} {event.locality}", count)
            return None
        hashes = [_hash(h) for h in event.block_hashes]
        if event.type == "BlockRemoved":
            return BlocksRemoved(hashes, medium, group)
        return self._stored(event, hashes, medium, group)

    def _stored(self, event: _Event, hashes: list[bytes], medium: Medium, group: int) -> BlocksStored:
        parent = None if event.parent_block_hash is None else _hash(event.parent_block_hash)
        told = _salt_and_extras(event)
        if told is None:
            if event.extra_keys is not None or event.lora_id is not None:
                self._log("extra keys", f"{event.lora_name} {_shape(event.extra_keys)}")
            return BlocksStored(hashes, parent, (), event.block_size, medium, group=group)
        salt, extras = told
        return BlocksStored(
            hashes,
            parent,
            event.token_ids,
            event.block_size,
            medium,
            cache_salt=salt,
            adapter=event.lora_name or "",
            extras=extras if any(extras) else (),
            group=group,
        )

    def _skip(self, skipped: Counter[str], reason: str, detail: str, count: int = 1) -> None:
        skipped[reason] += count
        self._log(reason, detail)

    def _log(self, reason: str, detail: str) -> None:
        if (reason, detail) not in self._logged and len(self._logged) < _MAX_LOGGED:
            self._logged.add((reason, detail))
            log.warning("block events not understood", extra={"reason": reason, "detail": detail})


def _kind(raw: msgspec.Raw) -> str:
    try:
        return msgspec.msgpack.decode(raw, type=_Kind).type
    except msgspec.DecodeError:
        return ""


def _medium(event: _Event) -> Medium | None:
    """Where the blocks lie; None for names that vLLM does not define.

    Connectors use others ("cpu") for stores whose place and evictions they do not tell.
    """
    medium = _MEDIA.get(event.medium or "")
    match event.locality:
        case None | "LOCAL":
            return medium
        case "REMOTE":
            return medium and Medium.REMOTE
    return None


def _salt_and_extras(event: _Event) -> tuple[str, list[bytes]] | None:
    """The prompt's salt and each block's extra; None where the engine does not tell, or tells in an unknown way.

    A block's extra keys are, in order: the adapter's name, (identifier, offset) of each multimodal item, the salt on a
    prompt's first block, a digest of prompt embeddings. They come without tags, so place and type tell them apart.
    """
    if event.extra_keys is None or len(event.extra_keys) != len(event.block_hashes):
        return None
    if event.lora_id is not None and not event.lora_name:
        return None
    salt, extras = "", []
    for index, keys in enumerate(event.extra_keys):
        left = list(keys or ())
        if event.lora_name and (not left or left.pop(0) != event.lora_name):
            return None
        media = []
        while left and isinstance(left[0], list):
            item = left.pop(0)
            if [type(part) for part in item] != [str, int]:
                return None
            media.append((item[0], item[1]))
        if left and isinstance(left[0], str) and index == 0 and event.parent_block_hash is None:
            salt = left.pop(0)
        embeds = left.pop(0) if left and isinstance(left[0], bytes) else b""
        if left:
            return None
        extras.append(block_extra(media, embeds))
    return salt, extras


def _shape(extra_keys: list[list[Any] | None] | None) -> str:
    """Types only: salts and identifiers are not for logs."""
    kinds = {type(key).__name__ for keys in extra_keys or () for key in keys or ()}
    return ", ".join(sorted(kinds))


def _hash(block_hash: bytes | int) -> bytes:
    return block_hash if isinstance(block_hash, bytes) else block_hash.to_bytes(8, "little")
