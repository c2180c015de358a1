"""CPU kernels of the ops whose meaning torch runs slower than it could. `KERNELS`: name of the op -> kernel."""

from collections.abc import Callable, Mapping
from typing import Any

from omni_kernels.backends.cpu import (
    grouped_matmul,
    moe_experts,
    moe_gate,
    moe_permute,
    paged_attention,
    rms_norm,
    rotary,
    sampling,
    swiglu,
)

_FAMILIES: tuple[Any, ...] = (
    grouped_matmul,
    moe_experts,
    moe_gate,
    moe_permute,
    paged_attention,
    rms_norm,
    rotary,
    sampling,
    swiglu,
)
KERNELS: Mapping[str, Callable[..., Any]] = {
    name: kernel for family in _FAMILIES for name, kernel in family.KERNELS.items()
}
