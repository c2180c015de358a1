"""Messages to values and back."""

from omni.engine.v1 import engine_pb2
from omni.kvstore.v1 import kvstore_service_pb2 as pb
from omni_common.blocks import KEY_BYTES
from omni_common.errors import InvalidRequest
from omni_kvstore.feed import Update
from omni_kvstore.membership import Action, Batch, BlockChange, BlockEvent, Match, Worker, WorkerChange

MAX_EPOCH = 2**53 - 1
MAX_NAME_BYTES = 256
_ACTIONS = {
    pb.BLOCK_ACTION_STORED: Action.STORED,
    pb.BLOCK_ACTION_REMOVED: Action.REMOVED,
    pb.BLOCK_ACTION_CLEARED: Action.CLEARED,
}
_WIRE_ACTIONS = {action: number for number, action in _ACTIONS.items()}
# The store's holder numbers have room for media 0 to 7.
_MEDIA = range(1, 8)


def worker_from_wire(info: engine_pb2.WorkerInfo, draining: bool) -> Worker:
    """Raises `InvalidRequest` naming the field that is missing or out of range."""
    if not 0 < len(info.worker_id.encode()) <= MAX_NAME_BYTES:
        raise InvalidRequest(f"worker_id must have 1 to {MAX_NAME_BYTES} bytes", field="info.worker_id")
    if not info.address:
        raise InvalidRequest("address must be host:port", field="info.address")
    if not 0 < info.epoch <= MAX_EPOCH:
        raise InvalidRequest(f"epoch must be 1 to {MAX_EPOCH}, not {info.epoch}", field="info.epoch")
    payload = info.SerializeToString(deterministic=True)
    return Worker(info.worker_id, info.epoch, info.model, info.block_size, payload, draining)


def batch_from_wire(request: pb.PublishBlocksRequest) -> Batch:
    """Raises `InvalidRequest` naming the field that is missing or out of range."""
    if not request.worker_id:
        raise InvalidRequest("worker_id is missing", field="worker_id")
    if not 0 < request.sequence <= MAX_EPOCH:
        raise InvalidRequest("sequence counts from 1", field="sequence")
    events = tuple(_event_from_wire(event) for event in request.events)
    return Batch(request.worker_id, request.epoch, request.sequence, request.snapshot, events)


def _event_from_wire(event: pb.BlockEvent) -> BlockEvent:
    if event.action not in _ACTIONS:
        raise InvalidRequest(f"unknown block action {event.action}", field="events.action")
    action = _ACTIONS[event.action]
    if action is Action.CLEARED:
        return BlockEvent(action, 0, b"")
    if event.medium not in _MEDIA:
        raise InvalidRequest(f"unknown medium {event.medium}", field="events.medium")
    return BlockEvent(action, event.medium, checked_keys(event.block_keys, "events.block_keys"))


def checked_keys(keys: bytes, field: str, max_blocks: int | None = None) -> bytes:
    """The keys, if they are whole ones and not too many."""
    if len(keys) % KEY_BYTES:
        raise InvalidRequest(f"{field} must hold {KEY_BYTES} bytes per key, not {len(keys)} in all", field=field)
    if max_blocks is not None and len(keys) > max_blocks * KEY_BYTES:
        raise InvalidRequest(f"{field} holds {len(keys) // KEY_BYTES} keys; at most {max_blocks}", field=field)
    return keys


def matches_to_wire(matches: list[Match]) -> pb.LookupResponse:
    # Medium numbers are the wire's own, so they pass as they are.
    rows = [pb.PrefixMatch(worker_id=m.worker_id, medium=m.medium, num_blocks=m.num_blocks) for m in matches]  # type: ignore[arg-type]
    return pb.LookupResponse(matches=rows)


def update_to_wire(update: Update, version: int) -> pb.WatchResponse:
    return pb.WatchResponse(
        version=version,
        snapshot=update.snapshot,
        workers=[_worker_change(change) for change in update.workers],
        blocks=[_block_change(change) for change in update.blocks],
        degraded=update.degraded,
    )


def _worker_change(change: WorkerChange) -> pb.WorkerChange:
    info = engine_pb2.WorkerInfo.FromString(change.worker.info)
    return pb.WorkerChange(info=info, removed=change.removed, draining=change.worker.draining)


def _block_change(change: BlockChange) -> pb.BlockChange:
    event = change.event
    wire = pb.BlockEvent(action=_WIRE_ACTIONS[event.action], medium=event.medium, block_keys=event.keys)  # type: ignore[arg-type]
    return pb.BlockChange(worker_id=change.worker_id, epoch=change.epoch, event=wire)
