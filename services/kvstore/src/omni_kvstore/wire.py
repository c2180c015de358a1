"""Messages to values and back."""

from omni.engine.v1 import engine_pb2
from omni.kvstore.v1 import kvstore_service_pb2 as pb
from omni_common.addresses import checked_address
from omni_common.blocks import KEY_BYTES
from omni_common.errors import InvalidRequest
from omni_kvstore.blocks import Action, Batch, BlockChange, BlockEvent, Match, pack_positions, unpack_positions
from omni_kvstore.events import MEDIA
from omni_kvstore.feed import Interest, Position, Update
from omni_kvstore.membership import Worker, WorkerChange
from omni_kvstore.store import Standing

MAX_EPOCH = 2**53 - 1
MAX_NAME_BYTES = 256
MAX_INFO_BYTES = 65_536
"""Every change of it is in Redis some thousand times, and all members' together in one message to each watch."""
_ACTIONS = {
    pb.BLOCK_ACTION_STORED: Action.STORED,
    pb.BLOCK_ACTION_REMOVED: Action.REMOVED,
    pb.BLOCK_ACTION_CLEARED: Action.CLEARED,
}
_WIRE_ACTIONS = {action: number for number, action in _ACTIONS.items()}
_POOL_MEDIA = MEDIA[1:]


def worker_from_wire(info: engine_pb2.WorkerInfo, draining: bool) -> Worker:
    """Raises `InvalidRequest` naming the field that is missing or out of range."""
    if not 0 < len(info.worker_id.encode()) <= MAX_NAME_BYTES:
        raise InvalidRequest(f"worker_id must have 1 to {MAX_NAME_BYTES} bytes", field="info.worker_id")
    try:
        checked_address(info.address)
    except ValueError as error:
        raise InvalidRequest(f"address {error}", field="info.address") from None
    if not 0 < info.epoch <= MAX_EPOCH:
        raise InvalidRequest(f"epoch must be 1 to {MAX_EPOCH}, not {info.epoch}", field="info.epoch")
    payload = info.SerializeToString(deterministic=True)
    if len(payload) > MAX_INFO_BYTES:
        raise InvalidRequest(f"info has {len(payload)} bytes; at most {MAX_INFO_BYTES}", field="info")
    return Worker(info.worker_id, info.epoch, info.model, info.block_size, payload, draining, _pool_medium(info))


def _pool_medium(info: engine_pb2.WorkerInfo) -> int:
    """Medium of a pool; 0 of a worker."""
    is_pool = info.role == engine_pb2.ROLE_STORE
    if is_pool != info.HasField("pool"):
        raise InvalidRequest("pool must be set where role is ROLE_STORE, and only there", field="info.pool")
    if not is_pool:
        return 0
    if info.pool.medium not in _POOL_MEDIA:
        raise InvalidRequest("a pool's medium must be host, disk or remote", field="info.pool.medium")
    if info.pool.latency_ms < 0 or info.pool.ms_per_block < 0:
        raise InvalidRequest("a pool's cost must not be negative", field="info.pool")
    return info.pool.medium


def batch_from_wire(request: pb.PublishBlocksRequest) -> Batch:
    """Raises `InvalidRequest` naming the field that is missing or out of range."""
    if not request.worker_id:
        raise InvalidRequest("worker_id is missing", field="worker_id")
    if not 0 < request.sequence <= MAX_EPOCH:
        raise InvalidRequest("sequence counts from 1", field="sequence")
    events = tuple(_event_from_wire(event) for event in request.events)
    occurred_ms = request.occurred_unix_ms
    return Batch(request.worker_id, request.epoch, request.sequence, request.snapshot, events, occurred_ms)


def _event_from_wire(event: pb.BlockEvent) -> BlockEvent:
    if event.action not in _ACTIONS:
        raise InvalidRequest(f"unknown block action {event.action}", field="events.action")
    action = _ACTIONS[event.action]
    if action is Action.CLEARED:
        return BlockEvent(action, 0, b"")
    if event.medium not in MEDIA:
        raise InvalidRequest(f"unknown medium {event.medium}", field="events.medium")
    keys = checked_keys(event.block_keys, "events.block_keys")
    if len(event.span) != KEY_BYTES:
        message = f"span must be the {KEY_BYTES} bytes of the span's first block key, not {len(event.span)}"
        raise InvalidRequest(message, field="events.span")
    if action is Action.REMOVED:
        return BlockEvent(action, event.medium, keys, event.span)
    if len(event.positions) not in (1, len(keys) // KEY_BYTES):
        message = f"positions must be one, or one per key; there are {len(event.positions)}"
        raise InvalidRequest(message, field="events.positions")
    return BlockEvent(action, event.medium, keys, event.span, pack_positions(event.positions))


def checked_keys(keys: bytes, field: str, max_blocks: int | None = None) -> bytes:
    """The keys, if they are whole ones and not too many."""
    if len(keys) % KEY_BYTES:
        raise InvalidRequest(f"{field} must hold {KEY_BYTES} bytes per key, not {len(keys)} in all", field=field)
    if max_blocks is not None and len(keys) > max_blocks * KEY_BYTES:
        raise InvalidRequest(f"{field} holds {len(keys) // KEY_BYTES} keys; at most {max_blocks}", field=field)
    return keys


def lookup_from_wire(request: pb.LookupRequest, max_blocks: int) -> tuple[str, int, bytes]:
    """Model, block size and keys.

    Raises `InvalidRequest` naming the field that is missing or out of range.
    """
    if not request.model:
        raise InvalidRequest("model is missing", field="model")
    if not request.block_size:
        raise InvalidRequest("block_size is missing", field="block_size")
    return request.model, request.block_size, checked_keys(request.block_keys, "block_keys", max_blocks)


def watch_from_wire(request: pb.WatchRequest) -> tuple[Interest, Position | None]:
    resume = Position(request.resume.dataset, request.resume.event) if request.HasField("resume") else None
    return Interest(request.blocks, request.model), resume


def matches_to_wire(matches: list[Match], degraded: bool) -> pb.LookupResponse:
    # Medium numbers are the wire's own, so they pass as they are.
    rows = [
        pb.PrefixMatch(worker_id=m.worker_id, medium=m.medium, num_blocks=m.num_blocks, pool=m.pool)  # type: ignore[arg-type]
        for m in matches
    ]
    return pb.LookupResponse(matches=rows, degraded=degraded)


def update_to_wire(update: Update, version: int) -> pb.WatchResponse:
    at = update.position
    return pb.WatchResponse(
        version=version,
        snapshot=update.snapshot,
        workers=[_worker_change(change) for change in update.workers],
        blocks=[_block_change(change) for change in update.blocks],
        degraded=update.degraded,
        position=pb.WatchPosition(dataset=at.dataset, event=at.event) if at else None,
        complete=update.complete,
    )


def standing_to_wire(standing: Standing) -> pb.WorkerState:
    return pb.WorkerState(
        info=engine_pb2.WorkerInfo.FromString(standing.worker.info),
        draining=standing.worker.draining,
        lease_left_s=standing.lease_left_s,
        sequence=standing.sequence,
        wants_snapshot=standing.wants_snapshot,
        num_blocks=standing.num_blocks,
    )


def held_to_wire(change: BlockChange, degraded: bool) -> pb.ListBlocksResponse:
    event = change.event
    return pb.ListBlocksResponse(epoch=change.epoch, medium=event.medium, block_keys=event.keys, degraded=degraded)  # type: ignore[arg-type]


def _worker_change(change: WorkerChange) -> pb.WorkerChange:
    worker = change.worker
    if worker.info:
        info = engine_pb2.WorkerInfo.FromString(worker.info)
    else:
        info = engine_pb2.WorkerInfo(worker_id=worker.worker_id, epoch=worker.epoch, model=worker.model)
    return pb.WorkerChange(info=info, removed=change.removed, draining=worker.draining)


def _block_change(change: BlockChange) -> pb.BlockChange:
    event = change.event
    wire = pb.BlockEvent(
        action=_WIRE_ACTIONS[event.action],
        medium=event.medium,  # type: ignore[arg-type]
        block_keys=event.keys,
        positions=unpack_positions(event.positions).tolist(),
    )
    return pb.BlockChange(worker_id=change.worker_id, epoch=change.epoch, event=wire)
