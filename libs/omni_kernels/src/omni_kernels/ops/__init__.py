"""One module per family of ops: meaning, fake form, validator, samples. `OPS` lists every op by name."""

from collections.abc import Mapping
from typing import Any

from omni_kernels.case import Op
from omni_kernels.ops import (
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
    speculative,
    swiglu,
)

_FAMILIES = (
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
    speculative,
    swiglu,
)
OPS: Mapping[str, Op[..., Any]] = {op.name: op for family in _FAMILIES for op in family.OPS}
