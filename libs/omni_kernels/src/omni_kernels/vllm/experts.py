"""vLLM's method of unquantized expert layers, on our ops. Imported where vLLM is."""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from omni_kernels.ops import OPS
from omni_kernels.vllm.bound import bound

_PERMUTE = bound(OPS["moe_permute"])
_GROUPED_MATMUL = bound(OPS["grouped_matmul"])
_SWIGLU = bound(OPS["swiglu"])
_COMBINE = bound(OPS["moe_combine"])


class OmniExperts(UnquantizedFusedMoEMethod):  # type: ignore[misc]
    """Experts as permute, grouped matmul, SwiGLU, grouped matmul, combine.

    Weights stay as checkpoints store them, (experts, 2 * intermediate, hidden) and (experts, hidden, intermediate).
    Raises NotImplementedError for layers with biases, other activations, or router weights applied to the input.
    """

    def __init__(self, moe: Any) -> None:
        super().__init__(moe)
        if moe.has_bias or not moe.is_act_and_mul:
            raise NotImplementedError("kernels: experts: layers with biases, or without a gate, are not known")

    @property
    def is_monolithic(self) -> bool:
        return False

    @property
    def topk_indices_dtype(self) -> torch.dtype:
        return torch.int32

    def process_weights_after_loading(self, layer: Any) -> None:
        if str(layer.activation.value) != "silu" or layer.apply_router_weight_on_input:
            raise NotImplementedError(f"kernels: experts: activation {layer.activation.value} is not known")

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        return None

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Any = None,
    ) -> Tensor:
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids]
        rows, source, sizes = _PERMUTE(x, topk_ids, layer.local_num_experts)
        hidden = _SWIGLU(_GROUPED_MATMUL(rows, layer.w13_weight.transpose(1, 2), sizes))
        computed = _GROUPED_MATMUL(hidden, layer.w2_weight.transpose(1, 2), sizes)
        combined: Tensor = _COMBINE(computed, source, topk_weights, None)
        return combined
