"""Ascend kernels through torch_npu. Importing this package needs torch_npu. `KERNELS`: name of the op -> kernel."""

from collections.abc import Callable, Mapping
from typing import Any

from omni_kernels.backends.npu import (
    grouped_matmul,
    kv_blocks,
    mla_attention,
    moe_experts,
    moe_gate,
    moe_permute,
    paged_attention,
    quant,
    rms_norm,
    rotary,
    sampling,
    sink_recent_attention,
    sparse_attention,
    swiglu,
)

_FAMILIES: tuple[Any, ...] = (
    grouped_matmul,
    kv_blocks,
    mla_attention,
    moe_experts,
    moe_gate,
    moe_permute,
    paged_attention,
    quant,
    rms_norm,
    rotary,
    sampling,
    sink_recent_attention,
    sparse_attention,
    swiglu,
)
KERNELS: Mapping[str, Callable[..., Any]] = {
    name: kernel for family in _FAMILIES for name, kernel in family.KERNELS.items()
}
