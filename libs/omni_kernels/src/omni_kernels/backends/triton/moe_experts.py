"""Experts of a layer: a composition of the kernels of their parts; what is passed on is rounded to the dtype of `x`."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from omni_kernels.backends.triton.grouped_matmul import grouped_matmul
from omni_kernels.backends.triton.moe_permute import moe_combine, moe_permute
from omni_kernels.backends.triton.rows import swiglu


def moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
    """Rows of other ranks stand behind the last group, where `grouped_matmul` leaves zeros."""
    rows, source, sizes = moe_permute(x, slots, len(gate_up))
    activated = swiglu(grouped_matmul(rows, gate_up.transpose(1, 2), sizes))
    return moe_combine(grouped_matmul(activated, down.transpose(1, 2), sizes), source, weights, None)


KERNELS: Mapping[str, Callable[..., Any]] = {"moe_experts": moe_experts}
