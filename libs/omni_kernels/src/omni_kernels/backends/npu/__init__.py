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

KERNELS: Mapping[str, Callable[..., Any]] = {
    **grouped_matmul.KERNELS,
    **kv_blocks.KERNELS,
    **mla_attention.KERNELS,
    **moe_experts.KERNELS,
    **moe_gate.KERNELS,
    **moe_permute.KERNELS,
    **paged_attention.KERNELS,
    **quant.KERNELS,
    **rms_norm.KERNELS,
    **rotary.KERNELS,
    **sampling.KERNELS,
    **sink_recent_attention.KERNELS,
    **sparse_attention.KERNELS,
    **swiglu.KERNELS,
}
