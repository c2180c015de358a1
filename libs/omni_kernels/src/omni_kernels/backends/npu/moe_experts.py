"""Experts on Ascend: a composition of the calls of their parts, which have no fused form for weights in bfloat16."""

from collections.abc import Callable, Mapping
from typing import Any

import torch_npu
from torch import Tensor

from omni_kernels.backends.npu.grouped_matmul import product
from omni_kernels.backends.npu.moe_permute import combine, permute


def _moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
    """Within the limits of `moe_permute` and `grouped_matmul`."""
    rows, source, sizes = permute(x, slots, len(gate_up))
    if len(rows) == 0:
        return x.new_empty(x.shape)
    activated = torch_npu.npu_swiglu(product(rows, gate_up.transpose(1, 2), sizes))
    return combine(product(activated, down.transpose(1, 2), sizes), source, weights, None)


KERNELS: Mapping[str, Callable[..., Any]] = {"moe_experts": _moe_experts}
