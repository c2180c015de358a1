"""Contract messages <-> the proxy's values."""

from collections.abc import Iterator

from omni.decode.v1 import decode_service_pb2 as decode_pb
from omni.engine.v1 import engine_pb2, worker_service_pb2
from omni.kv.v1 import kv_pb2
from omni.kvstore.v1 import kvstore_service_pb2 as kvstore_pb
from omni.prefill.v1 import prefill_service_pb2 as prefill_pb
from omni_proxy.ports import (
    FinishReason,
    KvHandle,
    LogprobRow,
    PrefillAnswer,
    PrefillOrder,
    SequenceStart,
    Submission,
    Timings,
)
from omni_proxy.replica import Action, BlockChange, Holder, Position
from omni_proxy.sampling import Sampling
from omni_proxy.scheduling.forecast import LoadCost
from omni_proxy.worker import Load, Role, Worker

_FINISH = {
    engine_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    engine_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    engine_pb2.FINISH_REASON_ABORT: FinishReason.ABORT,
    engine_pb2.FINISH_REASON_ERROR: FinishReason.ERROR,
}
_ACTIONS = {
    kvstore_pb.BLOCK_ACTION_STORED: Action.STORED,
    kvstore_pb.BLOCK_ACTION_REMOVED: Action.REMOVED,
    kvstore_pb.BLOCK_ACTION_CLEARED: Action.CLEARED,
}
_POOL_MEDIA = (kv_pb2.MEDIUM_HOST, kv_pb2.MEDIUM_DISK, kv_pb2.MEDIUM_REMOTE)
_MEDIA = (kv_pb2.MEDIUM_HBM, *_POOL_MEDIA)
_ROLES = {
    engine_pb2.ROLE_PREFILL: Role.PREFILL,
    engine_pb2.ROLE_DECODE: Role.DECODE,
    engine_pb2.ROLE_BOTH: Role.BOTH,
}


def sampling_to_wire(sampling: Sampling) -> engine_pb2.Sampling:
    return engine_pb2.Sampling(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        logit_bias=sampling.logit_bias,
    )


def prefill_to_wire(order: PrefillOrder) -> prefill_pb.PrefillRequest:
    return prefill_pb.PrefillRequest(
        request_id=order.request_id,
        model=order.model,
        token_ids=order.token_ids,
        sampling=sampling_to_wire(order.sampling),
        block_keys=order.block_keys,
        proxy_id=order.proxy_id,
        uncached_tokens=order.uncached_tokens,
        cache_salt=order.cache_salt,
        adapter=order.adapter,
    )


def prefill_from_wire(message: prefill_pb.PrefillResponse) -> PrefillAnswer:
    return PrefillAnswer(
        first_token_id=message.first_token_id,
        finish_reason=_FINISH.get(message.finish_reason),
        kv_handle=_handle_from_wire(message.kv_handle) if message.HasField("kv_handle") else None,
        cached_tokens=message.cached_tokens,
        timings=_timings(message.timings),
        logprobs=logprobs_from_wire(message.logprobs) if message.HasField("logprobs") else (),
    )


def submit_to_wire(stream_id: int, submission: Submission) -> decode_pb.Submit:
    handle = submission.kv_handle
    return decode_pb.Submit(
        stream_id=stream_id,
        request_id=submission.request_id,
        model=submission.model,
        token_ids=submission.token_ids,
        num_output_tokens=submission.num_output_tokens,
        sampling=sampling_to_wire(submission.sampling),
        kv_handle=None if handle is None else _handle_to_wire(handle),
        traceparent=submission.traceparent,
        deadline_ms=submission.deadline_ms,
        uncached_tokens=submission.uncached_tokens,
        cache_salt=submission.cache_salt,
        adapter=submission.adapter,
    )


def start_from_wire(message: decode_pb.SequenceStart) -> SequenceStart:
    return SequenceStart(message.cached_tokens, message.pulled_tokens, message.fell_back, _timings(message.timings))


def finish_from_wire(reason: engine_pb2.FinishReason) -> FinishReason:
    return _FINISH.get(reason, FinishReason.ERROR)


def logprobs_from_wire(message: engine_pb2.Logprobs) -> list[LogprobRow]:
    width, ids, values = message.width, list(message.token_ids), list(message.logprobs)
    if width < 1:
        return []
    return [LogprobRow(ids[at : at + width], values[at : at + width]) for at in range(0, len(ids), width)]


def role_from_wire(role: engine_pb2.Role) -> Role | None:
    """None where it is not told."""
    return _ROLES.get(role)


def worker_from_wire(info: engine_pb2.WorkerInfo) -> Worker:
    return Worker(
        id=info.worker_id,
        address=info.address,
        role=role_from_wire(info.role) or Role.BOTH,
        epoch=info.epoch,
        model=info.model,
        block_size=info.block_size,
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        kv_connector=info.kv_connector,
        engine=info.engine,
        num_blocks=info.num_blocks,
        max_num_batched_tokens=info.max_num_batched_tokens,
        labels=dict(info.labels),
        adapters=frozenset(filter(None, info.adapters)),
        adapter_load_ms=info.adapter_load_ms,
        weights={
            name: digest
            for name, digest in (("", info.weights), *zip(info.adapters, info.adapter_weights, strict=False))
            if digest
        },
    )


def is_pool(info: engine_pb2.WorkerInfo) -> bool:
    """A place to load blocks from, which takes no work."""
    return info.role == engine_pb2.ROLE_STORE


def holder_from_wire(info: engine_pb2.WorkerInfo) -> Holder:
    if not is_pool(info):
        return Holder(info.worker_id, info.epoch)
    cost = LoadCost(info.pool.latency_ms, info.pool.ms_per_block)
    medium = info.pool.medium if info.pool.medium in _POOL_MEDIA else kv_pb2.MEDIUM_REMOTE
    return Holder(info.worker_id, info.epoch, medium, cost)


def changes_from_wire(message: kvstore_pb.WatchResponse) -> Iterator[BlockChange]:
    """Changes of an action or a medium this version does not know are left out."""
    for change in message.blocks:
        event, action = change.event, _ACTIONS.get(change.event.action)
        if action is Action.CLEARED or (action is not None and event.medium in _MEDIA):
            yield BlockChange(
                change.worker_id, change.epoch, action, event.medium, event.block_keys, list(event.positions)
            )


def position_from_wire(message: kvstore_pb.WatchResponse) -> Position | None:
    if not message.HasField("position"):
        return None
    return Position(message.position.dataset, message.position.event)


def position_to_wire(position: Position | None) -> kvstore_pb.WatchPosition | None:
    return None if position is None else kvstore_pb.WatchPosition(dataset=position.dataset, event=position.event)


def load_from_wire(message: worker_service_pb2.WatchStatsResponse) -> Load:
    return Load(
        running=message.running,
        waiting=message.waiting,
        queued_tokens=message.queued_tokens,
        kv_usage=message.kv_usage,
        leases=message.leases,
        step_ms=message.step_ms,
        draining=message.draining,
        others_prefills=message.others_prefills,
        others_uncached_tokens=message.others_uncached_tokens,
        others_sequences=message.others_sequences,
        context_tokens=message.context_tokens,
        steps=message.steps,
        busy_ms=message.busy_ms,
        computed_prompt_tokens=message.computed_prompt_tokens,
        prompts=message.prompts,
        prompt_tokens=message.prompt_tokens,
        prompt_busy_ms=message.prompt_busy_ms,
        adapters=frozenset(message.adapters),
    )


def _timings(message: engine_pb2.Timings) -> Timings:
    return Timings(message.queue_ms, message.compute_ms, message.transfer_ms, message.total_ms)


def _handle_to_wire(handle: KvHandle) -> kv_pb2.KvHandle:
    return kv_pb2.KvHandle(
        opaque=handle.opaque,
        engine_id=handle.engine_id,
        lease_id=handle.lease_id,
        num_tokens=handle.num_tokens,
        num_blocks=handle.num_blocks,
        lease_s=handle.lease_s,
        lease_ends_unix_ms=handle.lease_ends_unix_ms,
        block_size=handle.block_size,
    )


def _handle_from_wire(message: kv_pb2.KvHandle) -> KvHandle:
    return KvHandle(
        opaque=message.opaque,
        engine_id=message.engine_id,
        lease_id=message.lease_id,
        num_tokens=message.num_tokens,
        num_blocks=message.num_blocks,
        block_size=message.block_size,
        lease_s=message.lease_s,
        lease_ends_unix_ms=message.lease_ends_unix_ms,
    )
