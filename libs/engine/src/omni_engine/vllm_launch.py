"""Starting vLLM from a launch plan, and what the engine that came of it is."""

from collections.abc import Mapping, Sequence
from typing import Any

from omni_common.errors import InvalidRequest
from omni_engine.ports import EngineInfo
from omni_engine.vllm_adapters import Adapter
from omni_engine.vllm_args import EXPERT_COUNTS, LaunchPlan
from omni_engine.vllm_events import KvGroups
from omni_engine.vllm_pattern import require_known_vllm
from omni_engine.vllm_settings import VllmSettings

LAYERS_SINCE = (0, 32)


def build(plan: LaunchPlan, settings: VllmSettings) -> Any:
    """vLLM's AsyncLLM. Runs in a thread without an event loop, so that it starts no output reader of its own."""
    from vllm.config import KVEventsConfig, KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    _require_known_layers(settings)
    arguments = dict(plan.arguments)
    for name, kind in (("kv_transfer_config", KVTransferConfig), ("kv_events_config", KVEventsConfig)):
        if name in arguments:
            arguments[name] = kind(**arguments[name])
    if settings.attention_pattern:
        require_known_vllm()
    engine_args = AsyncEngineArgs(**arguments)
    config = engine_args.create_engine_config()
    if settings.expert_parallel:
        # Asked for here and not in the arguments, which are refused on CPU. We decide what is moved, not vLLM.
        config.parallel_config.enable_eplb = True
        balancing = config.parallel_config.eplb_config
        balancing.num_redundant_experts = settings.redundant_experts
        balancing.use_async = False
        balancing.communicator = "torch_gloo"
    return AsyncLLM.from_vllm_config(
        config,
        enable_log_requests=engine_args.enable_log_requests,
        disable_log_stats=engine_args.disable_log_stats,
    )


def _require_known_layers(settings: VllmSettings) -> None:
    """Raises InvalidRequest on a vLLM whose layers `vllm_expert_shims` and `omni_kernels.vllm` do not know."""
    import vllm

    asked = {"expert_parallel": settings.expert_parallel, "kernels": settings.kernels != "vllm"}
    if tuple(map(int, vllm.__version__.split(".")[:2])) < LAYERS_SINCE:
        for name, is_asked in asked.items():
            if is_asked:
                raise InvalidRequest(f"{name} needs vLLM 0.32; this is {vllm.__version__}", field=f"vllm.{name}")


def lora_requests(adapters: Sequence[Adapter]) -> list[Any]:
    """What vLLM is to be asked with, for each adapter."""
    from vllm.lora.request import LoRARequest

    return [LoRARequest(adapter.name, adapter.number, str(adapter.path)) for adapter in adapters]


def describe(
    config: Any, plan: LaunchPlan, model: str, settings: VllmSettings, groups: KvGroups, weights: Mapping[str, str]
) -> EngineInfo:
    """The engine as vLLM's configuration has it; counts of all data-parallel cores together."""
    import vllm

    shape = config.model_config.hf_text_config
    experts = next((getattr(shape, name) for name in EXPERT_COUNTS if getattr(shape, name, None)), 0)
    dense = getattr(shape, "first_k_dense_replace", 0)
    cores = settings.data_parallel_size
    ranks = settings.num_ranks if settings.expert_parallel else 0
    return EngineInfo(
        model=model,
        engine="vllm",
        engine_version=vllm.__version__,
        engine_id=plan.engine_id,
        kv_connector=settings.kv_connector,
        block_size=groups.block_size or config.cache_config.block_size,
        num_blocks=cores * (config.cache_config.num_gpu_blocks or 0),
        max_model_len=config.model_config.max_model_len,
        max_num_seqs=cores * config.scheduler_config.max_num_seqs,
        max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
        num_moe_layers=shape.num_hidden_layers - dense if experts else 0,
        num_experts=experts,
        num_block_groups=max(1, len(groups)),
        fixed_role=plan.fixed_role,
        num_ep_ranks=ranks,
        expert_slots_per_rank=(experts + settings.redundant_experts) // ranks if ranks else 0,
        speculative=plan.speculative,
        weights=weights,
    )
