"""Settings to vLLM's engine arguments and to the environment its processes read."""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omni_common.errors import InvalidRequest
from omni_engine import vllm_adapters, vllm_pattern
from omni_engine.plugin import EXPERTS_VARIABLE, PROGRESS_VARIABLE
from omni_engine.vllm_adapters import Adapter, read_adapters
from omni_engine.vllm_cpu_fixes import (
    ADAPTER_OPS,
    ADAPTERS_BESIDE_EXPERTS,
    DRAFT_SAMPLING,
    FIXES_VARIABLE,
    INT8_EXPERTS,
    LATENT_ROTARY,
    MEMORY_IN_PLACE,
    SHORT_SPIN,
    has_few_cores,
    has_one_memory_node,
)
from omni_engine.vllm_pattern import read_pattern
from omni_engine.vllm_settings import VllmSettings
from omni_engine.vllm_speculation import Speculation
from omni_kernels.patterns.pattern import Pattern
from omni_kernels.vllm.parts import environment as kernels_environment
from omni_kernels.vllm.parts import ir_op_priority, parts_of

Role = Literal["prefill", "decode", "both"]
_KV_ROLES: dict[Role, str] = {"prefill": "kv_producer", "decode": "kv_consumer", "both": "kv_both"}
_GIB = 1 << 30
# What models call the number of routed experts of a layer.
EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What one engine start needs: vLLM arguments, environment, and a folder for its KV events, not made yet.

    `fixed_role` and `speculative` as in `EngineInfo`. `pattern` is the digest of an attention pattern.
    At most `adapter_slots` of the `adapters` are in one batch.
    """

    arguments: dict[str, Any]
    environment: dict[str, str]
    engine_id: str
    events_dir: Path | None
    fixed_role: str
    speculative: str = ""
    pattern: str | None = None
    adapters: tuple[Adapter, ...] = ()
    adapter_slots: int = 0

    @property
    def events_endpoint(self) -> str:
        return f"ipc://{self.events_dir}/events"

    @property
    def replay_endpoint(self) -> str:
        return f"ipc://{self.events_dir}/replay"


def plan_launch(
    settings: VllmSettings, model_dir: Path, model: str, role: Role, adapter_dirs: Mapping[str, Path] | None = None
) -> LaunchPlan:
    """Arguments and environment of an engine.

    Raises:
        InvalidRequest: the model directory has no config.json, its architecture cannot use the cache dtype or the
            drafter, its experts cannot be spread as asked, or an adapter cannot be served.
    """
    config = _model_config(model_dir)
    _check_cache_dtype(settings, config)
    _check_experts(settings, config)
    _check_cores(settings)
    pattern = read_pattern(settings, config)
    adapters = read_adapters(adapter_dirs or {}, settings, model_dir, config)
    slots = min(settings.adapter_slots or len(adapters), len(adapters))
    engine_id = uuid.uuid4().hex
    events_dir = Path(tempfile.gettempdir()) / f"omni-kv-{engine_id}" if settings.kv_events else None
    arguments: dict[str, Any] = {
        "model": str(model_dir),
        "served_model_name": model,
        "dtype": settings.dtype,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "data_parallel_size": settings.data_parallel_size,
        "enable_expert_parallel": settings.expert_parallel,
        "enable_prefix_caching": settings.enable_prefix_caching,
        "enforce_eager": _eager(settings),
        "worker_extension_cls": "omni_engine.vllm_worker.WorkerExtension",
    }
    optional = {"max_model_len": settings.max_model_len, "block_size": settings.block_size}
    arguments |= {name: value for name, value in optional.items() if value is not None}
    if priority := ir_op_priority(parts_of(settings.kernels, settings.platform)):
        arguments["ir_op_priority"] = priority
    cache_gib = settings.kv_cache_gib or (1.0 if settings.on_cpu else None)
    if cache_gib is not None:
        arguments["kv_cache_memory_bytes"] = int(cache_gib * _GIB)
    if settings.kv_connector:
        arguments["kv_transfer_config"] = _kv_transfer(settings, role, engine_id)
    if pattern and not pattern.is_full:
        _apply_pattern(pattern, arguments)
    drafter = settings.speculative.for_model(config) if settings.speculative else None
    if drafter and (drafting := _drafting(drafter, settings, role)):
        arguments["speculative_config"] = drafting
    if adapters:
        arguments |= vllm_adapters.arguments(adapters, slots)
    environment = _environment(settings)
    if fixes := _cpu_fixes(settings, config, has_adapters=bool(adapters)):
        environment[FIXES_VARIABLE] = fixes
    fixed = _fixed_role(settings, role)
    speculative = str(drafter) if drafter else ""
    digest = pattern.digest if pattern and not pattern.is_full else None
    plan = LaunchPlan(
        arguments, environment, engine_id, events_dir, fixed, speculative, digest, adapters, adapter_slots=slots
    )
    if events_dir:
        arguments["kv_events_config"] = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": plan.events_endpoint,
            "replay_endpoint": plan.replay_endpoint,
        }
    arguments |= settings.engine_args
    return plan


def _apply_pattern(pattern: Pattern, arguments: dict[str, Any]) -> None:
    arguments |= vllm_pattern.arguments(pattern)
    if transfer := arguments.get("kv_transfer_config"):
        transfer |= vllm_pattern.connector(pattern, transfer["kv_connector_extra_config"])


def _drafting(drafter: Speculation, settings: VllmSettings, role: Role) -> dict[str, Any] | None:
    """An engine that may only prefill needs the drafter's cache filled, no more."""
    return drafter.arguments(prefill_only=role == "prefill" and not settings.any_role)


def _cpu_fixes(settings: VllmSettings, config: dict[str, Any], *, has_adapters: bool) -> str:
    """What `vllm_cpu_fixes` must correct for this model on this machine."""
    if not settings.on_cpu:
        return ""
    needed = {
        LATENT_ROTARY: config.get("kv_lora_rank"),
        INT8_EXPERTS: config.get("quantization_config"),
        DRAFT_SAMPLING: settings.speculative,
        ADAPTER_OPS: has_adapters,
        ADAPTERS_BESIDE_EXPERTS: has_adapters and _num_experts_of(config),
        MEMORY_IN_PLACE: has_one_memory_node(),
        SHORT_SPIN: has_few_cores(),
    }
    return ",".join(name for name, is_needed in needed.items() if is_needed)


def cores_by_rank(cores: str) -> list[list[int]]:
    """'0-1|4,6' as [[0, 1], [4, 6]].

    Raises InvalidRequest for anything else.
    """
    try:
        return [[core for part in rank.split(",") for core in _core_range(part)] for rank in cores.split("|")]
    except ValueError:
        raise InvalidRequest(f"vllm.cores: {cores!r} is not like '0-3' or '0-1|2-3'", field="vllm.cores") from None


def _core_range(part: str) -> range:
    first, dash, last = part.partition("-")
    return range(int(first), int(last if dash else first) + 1)


def _kv_role(settings: VllmSettings, role: Role) -> str:
    """What the KV connector is started for. vLLM keeps blocks from being reused too early only where it may pull."""
    return _KV_ROLES["both" if settings.any_role else role]


def _fixed_role(settings: VllmSettings, role: Role) -> str:
    started_for = _kv_role(settings, role)
    if not settings.kv_connector or started_for == "kv_both":
        return ""
    variable = f"OMNI_{role.upper()}_VLLM__ANY_ROLE"
    return f"the KV connector was started as {started_for}; a worker started with {variable}=true can change its role"


def _kv_transfer(settings: VllmSettings, role: Role, engine_id: str) -> dict[str, Any]:
    return {
        "kv_connector": settings.kv_connector,
        "kv_connector_module_path": "omni_engine.vllm_nixl",
        "kv_role": _kv_role(settings, role),
        "engine_id": engine_id,
        "kv_buffer_device": "cpu" if settings.on_cpu else "cuda",
        # A pull that fails is computed again on the decode engine instead of failing the request.
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kv_lease_duration": settings.lease_s},
    }


def _environment(settings: VllmSettings) -> dict[str, str]:
    environment = {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": settings.kv_host,
        "UCX_TLS": settings.kv_transports,
        "UCX_NET_DEVICES": settings.kv_net_devices,
        # vLLM sets it too, but only where nixl has not been imported yet; our plugin imports it.
        "UCX_RCACHE_MAX_UNRELEASED": "1024",
        PROGRESS_VARIABLE: str(settings.kv_progress_interval_us),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if settings.expert_parallel:
        environment[EXPERTS_VARIABLE] = "1"
    environment |= kernels_environment(settings.kernels, settings.platform)
    if settings.cores and settings.on_cpu:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = settings.cores
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        environment["VLLM_LOGGING_LEVEL"] = "WARNING"
    return environment


def _eager(settings: VllmSettings) -> bool:
    if settings.enforce_eager is not None:
        return settings.enforce_eager
    if settings.expert_parallel and settings.platform == "cpu":
        return True
    return settings.on_cpu and not any(map(shutil.which, ("g++", "clang++")))


def _model_config(model_dir: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"model_dir {model_dir}: no readable config.json: {error}", field="model_dir") from None
    return config


def _check_cache_dtype(settings: VllmSettings, config: dict[str, Any]) -> None:
    uses_mla = bool(config.get("kv_lora_rank"))
    if settings.on_cpu and uses_mla and settings.kv_cache_dtype.startswith("fp8"):
        raise InvalidRequest(
            "kv_cache_dtype fp8 cannot run with multi-head latent attention on CPU; use auto",
            field="vllm.kv_cache_dtype",
        )


def _num_experts_of(config: dict[str, Any]) -> int:
    """Routed experts per layer in a model's config.json; 0 for a dense model."""
    shape = config.get("text_config", config)
    return next((int(shape[name]) for name in EXPERT_COUNTS if shape.get(name)), 0)


def _check_experts(settings: VllmSettings, config: dict[str, Any]) -> None:
    if not settings.expert_parallel:
        return
    experts, ranks = _num_experts_of(config), settings.num_ranks
    slots = experts + settings.redundant_experts
    if not experts:
        raise InvalidRequest("expert_parallel: the model has no experts", field="vllm.expert_parallel")
    if slots % ranks:
        raise InvalidRequest(
            f"{experts} experts and {settings.redundant_experts} spare slots do not spread evenly over {ranks} ranks",
            field="vllm.redundant_experts",
        )
    if slots // ranks > experts:
        raise InvalidRequest(
            f"{slots // ranks} slots per rank, but only {experts} experts: no rank holds an expert twice",
            field="vllm.redundant_experts",
        )
    if settings.platform == "cpu" and config.get("quantization_config"):
        raise InvalidRequest(
            "expert_parallel on CPU: the quantized expert kernels compute all experts on every rank",
            field="vllm.expert_parallel",
        )


def _check_cores(settings: VllmSettings) -> None:
    if not settings.cores or not settings.on_cpu:
        return
    given = len(cores_by_rank(settings.cores))
    if given != settings.num_ranks:
        raise InvalidRequest(
            f"vllm.cores names the cores of {given} ranks, '|' between them; there are {settings.num_ranks}",
            field="vllm.cores",
        )
