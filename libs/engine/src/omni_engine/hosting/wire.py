"""Messages of the contracts <-> values of the engine port."""

from collections.abc import Mapping, Sequence

from omni.engine.v1 import engine_pb2
from omni.kv.v1 import kv_pb2
from omni_common.errors import InvalidRequest
from omni_engine import ports
from omni_engine.hosting.settings import EngineRole

ROLES: Mapping[EngineRole, engine_pb2.Role] = {
    "prefill": engine_pb2.ROLE_PREFILL,
    "decode": engine_pb2.ROLE_DECODE,
    "both": engine_pb2.ROLE_BOTH,
}
FINISH_REASONS = {
    ports.FinishReason.STOP: engine_pb2.FINISH_REASON_STOP,
    ports.FinishReason.LENGTH: engine_pb2.FINISH_REASON_LENGTH,
    ports.FinishReason.ABORT: engine_pb2.FINISH_REASON_ABORT,
    ports.FinishReason.ERROR: engine_pb2.FINISH_REASON_ERROR,
}
MEDIA = {
    ports.Medium.HBM: kv_pb2.MEDIUM_HBM,
    ports.Medium.HOST: kv_pb2.MEDIUM_HOST,
    ports.Medium.DISK: kv_pb2.MEDIUM_DISK,
    ports.Medium.REMOTE: kv_pb2.MEDIUM_REMOTE,
}


def role_from_wire(role: engine_pb2.Role) -> EngineRole | None:
    """None for a role that no engine has."""
    return next((name for name, value in ROLES.items() if value == role), None)


def sampling_from_wire(message: engine_pb2.Sampling) -> ports.SamplingParams:
    """Raises InvalidRequest when `max_tokens` is 0."""
    if message.max_tokens < 1:
        raise InvalidRequest("sampling.max_tokens must be at least 1", field="sampling.max_tokens")
    return ports.SamplingParams(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        seed=message.seed if message.HasField("seed") else None,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        logit_bias=dict(message.logit_bias),
    )


def require_tokens(token_ids: Sequence[int]) -> list[int]:
    """Raises InvalidRequest when there are none."""
    if not token_ids:
        raise InvalidRequest("token_ids must not be empty", field="token_ids")
    return list(token_ids)


def handle_from_wire(message: kv_pb2.KvHandle) -> ports.KvHandle:
    return ports.KvHandle(
        opaque=message.opaque,
        engine_id=message.engine_id,
        lease_id=message.lease_id,
        num_tokens=message.num_tokens,
        num_blocks=message.num_blocks,
        block_size=message.block_size,
        lease_s=message.lease_s,
        lease_ends_unix_ms=message.lease_ends_unix_ms,
    )


def handle_to_wire(handle: ports.KvHandle) -> kv_pb2.KvHandle:
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


def timings_to_wire(timings: ports.Timings) -> engine_pb2.Timings:
    return engine_pb2.Timings(
        queue_ms=timings.queue_ms,
        compute_ms=timings.compute_ms,
        transfer_ms=timings.transfer_ms,
        total_ms=timings.total_ms,
    )


def logprobs_to_wire(logprobs: ports.Logprobs) -> engine_pb2.Logprobs:
    return engine_pb2.Logprobs(
        width=logprobs.width,
        token_ids=logprobs.token_ids,
        logprobs=logprobs.logprobs,
        sampled_ranks=logprobs.sampled_ranks,
    )


def info_to_wire(
    info: ports.EngineInfo,
    worker_id: str,
    address: str,
    role: EngineRole,
    epoch: int,
    labels: dict[str, str],
    layout_version: int = 0,
) -> engine_pb2.WorkerInfo:
    """What the worker is, for Describe and for the kvstore."""
    return engine_pb2.WorkerInfo(
        worker_id=worker_id,
        address=address,
        role=ROLES[role],
        epoch=epoch,
        model=info.model,
        block_size=info.block_size,
        num_blocks=info.num_blocks,
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        engine=info.engine,
        engine_version=info.engine_version,
        kv_connector=info.kv_connector,
        engine_id=info.engine_id,
        layout_version=layout_version,
        labels=labels,
        num_moe_layers=info.num_moe_layers,
        num_experts=info.num_experts,
        adapters=info.adapters,
        adapter_load_ms=info.adapter_load_ms,
        weights=info.weights.get("", ""),
        adapter_weights=[info.weights.get(name, "") for name in info.adapters],
    )
