"""vLLM's router of an expert layer, on `moe_gate`. Imported where vLLM is."""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.config import get_routing_method_type
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.v1.worker.ubatching import dbo_current_ubatch_id

from omni_kernels.ops import OPS
from omni_kernels.vllm.bound import bound

_GATE = bound(OPS["moe_gate"])


class OmniRouter(BaseRouter):  # type: ignore[misc]
    """Chooses experts and their copies and counts tokens in one op; takes the arguments of vLLM's factory."""

    def __init__(
        self,
        top_k: int,
        global_num_experts: int,
        renormalize: bool = True,
        use_grouped_topk: bool = False,
        num_expert_group: int | None = None,
        topk_group: int | None = None,
        scoring_func: str = "softmax",
        routed_scaling_factor: float = 1.0,
        e_score_correction_bias: Tensor | None = None,
        eplb_state: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__(top_k=top_k, global_num_experts=global_num_experts, eplb_state=eplb_state)
        self._renormalize = renormalize
        self._scoring = scoring_func
        self._groups = (num_expert_group or 1) if use_grouped_topk else 1
        self._top_k_groups = (topk_group or 1) if use_grouped_topk else 1
        self._scale = float(routed_scaling_factor)
        self._bias = e_score_correction_bias

    @property
    def routing_method_type(self) -> Any:
        return get_routing_method_type(
            scoring_func=self._scoring,
            top_k=self.top_k,
            renormalize=self._renormalize,
            num_expert_group=self._groups if self._groups > 1 else None,
            has_e_score_bias=self._bias is not None,
        )

    def _compute_routing(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        weights, experts, _, _ = self._gate(router_logits)
        return weights, experts

    def _select_experts(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        topk_indices_dtype: torch.dtype | None = None,
        *,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        state = self.eplb_state
        if state is None:
            weights, experts, slots, _ = self._gate(router_logits)
        else:
            self._validate_eplb_state()
            load = state.expert_load_view
            real = state.num_unpadded_tokens_tensors[dbo_current_ubatch_id()]
            weights, experts, slots, counts = self._gate(router_logits, state.logical_to_physical_map, len(load), real)
            if state.should_record_tensor:
                load += counts
        if self.capture_fn is not None:
            self.capture_fn(experts)
        return weights, self._convert_indices_dtype(slots, topk_indices_dtype)

    def _gate(
        self, logits: Tensor, replicas: Tensor | None = None, num_slots: int = 0, real_tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gated: tuple[Tensor, Tensor, Tensor, Tensor] = _GATE(
            logits,
            self._bias,
            self.top_k,
            self._scoring,
            self._groups,
            self._top_k_groups,
            self._renormalize,
            self._scale,
            replicas,
            num_slots or logits.shape[1],
            0,
            real_tokens,
        )
        return gated
