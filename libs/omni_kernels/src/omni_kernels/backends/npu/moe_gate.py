"""Routing on Ascend: scores, groups and choice in one fused call, copies and counts composed.

torch_npu's table look-up for copies, npu_moe_update_expert, chooses by token index modulo the number of copies; the
engines' choice is another (see `ops.moe_gate`), so it is computed with tensor operations.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch_npu
from torch import Tensor

from omni_kernels.checks import in_range, refuse
from omni_kernels.ops.moe_gate import EPS, GOLDEN


def _moe_gate(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_k_groups: int,
    renormalize: bool,
    scale: float,
    replicas: Tensor | None,
    num_slots: int,
    token_offset: int,
    real_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Takes up to 2048 experts, in groups of three or more. What `replicas` holds is not checked."""
    _check_limits(logits.shape[1], num_groups)
    is_sigmoid = scoring == "sigmoid"
    is_final = is_sigmoid and renormalize  # sigmoid scores the call divides by their sum, softmax ones it does not
    logits = logits.float()
    weights, experts, _ = torch_npu.npu_moe_gating_top_k(
        logits,
        top_k,
        bias=bias,
        k_group=top_k_groups,
        group_count=num_groups,
        group_select_mode=0 if bias is None else 1,
        renorm=0,
        norm_type=1 if is_sigmoid else 0,
        routed_scaling_factor=scale if is_final else 1.0,
        eps=EPS,
    )
    if not is_final:
        scores = logits.gather(1, experts.long()).sigmoid() if is_sigmoid else weights
        weights = scores * scale if not renormalize else scores * (scale / (scores.sum(-1, keepdim=True) + EPS))
    slots = experts if replicas is None else _copies(experts, replicas, token_offset)
    return weights, experts, slots, _counts(slots, num_slots, real_tokens)


def _check_limits(experts: int, groups: int) -> None:
    in_range("logits", experts, 3, 2048)
    size = experts // groups
    if size < 3 or -(-size // 32) * 32 * groups > 2048:
        refuse("num_groups", "npu takes groups of 3 experts or more, 2048 together in multiples of 32", groups)


def _copies(experts: Tensor, replicas: Tensor, token_offset: int) -> Tensor:
    chosen = experts.long()
    index = torch.arange(token_offset, token_offset + len(chosen), device=chosen.device).unsqueeze(1) + chosen
    fraction = (index * GOLDEN) & 0xFFFFFFFF
    copy = (fraction * (replicas >= 0).sum(-1)[chosen]) >> 32
    return replicas.flatten()[chosen * replicas.shape[1] + copy].int()


def _counts(slots: Tensor, num_slots: int, real_tokens: Tensor | None) -> Tensor:
    ones = torch.ones_like(slots, dtype=torch.int64)
    if real_tokens is not None:
        ones = ones * (torch.arange(len(slots), device=slots.device) < real_tokens).unsqueeze(1)
    return ones.new_zeros(num_slots).scatter_add_(0, slots.flatten().long(), ones.flatten())


KERNELS: Mapping[str, Callable[..., Any]] = {"moe_gate": _moe_gate}
