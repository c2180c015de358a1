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

KERNELS: Mapping[str, Callable[..., Any]] = {
    **grouped_matmul.KERNELS,
    **moe_experts.KERNELS,
    **moe_gate.KERNELS,
    **moe_permute.KERNELS,
    **paged_attention.KERNELS,
    **rms_norm.KERNELS,
    **rotary.KERNELS,
    **sampling.KERNELS,
    **swiglu.KERNELS,
}
