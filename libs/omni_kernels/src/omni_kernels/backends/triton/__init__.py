"""Triton kernels, one source for NVIDIA and Ascend. Importing this package needs triton. `KERNELS`: op -> kernel.

Tensors lie on the current device. Integers that only the device knows (lengths, group sizes) are never read back.
"""

from collections.abc import Callable, Mapping
from typing import Any

from omni_kernels.backends.triton import (
    attention,
    grouped_matmul,
    indexer,
    kv,
    mla,
    moe_experts,
    moe_gate,
    moe_permute,
    rotary,
    rows,
    sampling,
)

KERNELS: Mapping[str, Callable[..., Any]] = {
    **attention.KERNELS,
    **grouped_matmul.KERNELS,
    **indexer.KERNELS,
    **kv.KERNELS,
    **mla.KERNELS,
    **moe_experts.KERNELS,
    **moe_gate.KERNELS,
    **moe_permute.KERNELS,
    **rotary.KERNELS,
    **rows.KERNELS,
    **sampling.KERNELS,
}
