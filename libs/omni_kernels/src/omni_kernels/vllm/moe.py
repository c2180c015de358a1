"""Mixture-of-experts layers: the router's whole work as one op, and the experts as permute, grouped matmul, combine.

    logits -> moe_gate -> weights, experts        (the model's own experts, as vLLM captures them)
                       -> slots                   (physical ones: which copy of an expert computes a token)
                       -> counts                  (tokens per slot, what the placement service is told)

Replica choice is that of `omni_engine.vllm_expert_shims.map_and_record`; on CPU this router takes its place.
"""

import importlib
import logging
from typing import Any

log = logging.getLogger(__name__)

_LAYERS = "vllm.model_executor.layers.fused_moe"


def register_routing(platform: str) -> None:
    """Rebind the function that expert layers get their router from."""
    layers: Any = importlib.import_module(f"{_LAYERS}.layer")
    original = layers.create_fused_moe_router
    if getattr(original, "is_omni", False):
        return
    router: Any = importlib.import_module("omni_kernels.vllm.router").OmniRouter

    def create(**options: Any) -> Any:
        if reason := unknown_routing(options):
            log.warning("experts are chosen by vLLM's router: %s", reason)
            return original(**options)
        return router(**options)

    create.is_omni = True  # type: ignore[attr-defined]
    layers.create_fused_moe_router = create


def unknown_routing(options: dict[str, Any]) -> str:
    """What of a layer's routing `moe_gate` does not know; empty where it knows all."""
    if options.get("scoring_func", "softmax") not in ("softmax", "sigmoid"):
        return f"scoring {options['scoring_func']!r}"
    for name in ("custom_routing_function", "zero_expert_type", "hash_indices_table", "bias_vl"):
        if options.get(name) is not None:
            return name
    if options.get("num_fused_shared_experts"):
        return "shared experts among the routed ones"
    if importlib.import_module("vllm.envs").VLLM_MOE_ROUTING_SIMULATION_STRATEGY:
        return "routing is simulated"
    return ""


def register_experts(platform: str) -> None:
    """Replace the method of unquantized expert layers. Quantized ones keep vLLM's."""
    method: Any = importlib.import_module(f"{_LAYERS}.unquantized_fused_moe_method").UnquantizedFusedMoEMethod
    ours = importlib.import_module("omni_kernels.vllm.experts").OmniExperts
    method.register_oot(name="UnquantizedFusedMoEMethod")(ours)
