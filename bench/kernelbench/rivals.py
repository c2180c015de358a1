"""What vLLM runs on a CPU for the same work, as a call without arguments; None where it has nothing for these inputs.

Where vLLM has compiled kernels they are called as its layers call them; routing is its CPU router's own functions.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe.router.cpu_router import _grouped_topk, _softmax_topk
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from omni_engine.vllm_expert_shims import map_and_record

Call = Callable[[], Any]
C = torch.ops._C


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Call:
    out = torch.empty_like(x)
    return lambda: C.rms_norm(out, x, weight, eps)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Call:
    x, residual = x.clone(), residual.clone()
    return lambda: C.fused_add_rms_norm(x, residual, weight, eps)


def _swiglu(gate_up: Tensor) -> Call:
    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    return lambda: C.silu_and_mul(out, gate_up)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Call:
    positions, table, heads = torch.arange(len(x)), torch.cat((cos, sin), -1).to(x.dtype), x.flatten(1).clone()
    return lambda: C.rotary_embedding(positions, heads, None, x.shape[-1], table, not interleaved)


def _moe_gate(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    groups: int,
    top_k_groups: int,
    renormalize: bool,
    scale: float,
    replicas: Tensor | None,
    num_slots: int,
    token_offset: int,
) -> Call:
    """With copies, the engine's own mapping and counting behind vLLM's router; without, vLLM counts nothing."""

    def route() -> tuple[Tensor, Tensor]:
        if groups > 1:
            routed: tuple[Tensor, Tensor] = _grouped_topk(
                logits, top_k, renormalize, groups, top_k_groups, scoring, scale, bias
            )
            return routed
        plain: tuple[Tensor, Tensor] = _softmax_topk(logits, top_k, renormalize)
        return plain

    if replicas is None:
        return route
    load, count = torch.zeros(num_slots, dtype=torch.int32), (replicas >= 0).sum(-1)
    record = torch.ones((), dtype=torch.bool)
    return lambda: map_and_record(route()[1], load, replicas, count, record)


def _dynamic_quant(x: Tensor) -> Call:
    out, scale = torch.empty_like(x, dtype=torch.int8), torch.empty(len(x), 1)
    return lambda: C.dynamic_scaled_int8_quant(out, x, scale, None)


def _top_k_top_p(logits: Tensor, k: Tensor, p: Tensor) -> Call:
    return lambda: apply_top_k_top_p(logits.clone(), k.long(), p)


def _vllm_cache(keys: Tensor) -> tuple[Tensor, Tensor, str]:
    """Empty caches of the same size as vLLM's kernels lay them out."""
    blocks, size, heads, width = keys.shape
    both = torch.zeros(blocks, heads, 2 * size, width, dtype=keys.dtype)
    key_cache, value_cache = both.chunk(2, dim=2)
    return key_cache, value_cache, _get_attn_isa(keys.dtype, size, width)


def _paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, scale: float
) -> Call:
    key_cache, value_cache, isa = _vllm_cache(keys)
    slots = torch.arange(keys.shape[0] * keys.shape[1])
    ops.cpu_attn_reshape_and_cache(
        keys.flatten(0, 1).contiguous(), values.flatten(0, 1).contiguous(), key_cache, value_cache, slots, isa
    )
    heads, width = q.shape[1:]
    plan = ops.cpu_attn_get_scheduler_metadata(
        len(lengths), heads, keys.shape[2], width, lengths, q.dtype, starts, True, -1, isa, True
    )
    out = torch.empty_like(q)
    return lambda: ops.cpu_attention_with_kv_cache(
        q, key_cache, value_cache, out, starts, lengths, scale, True, None, -1, table, 0.0, plan, None
    )


def _mla_attention(
    latent: Tensor, rope: Tensor, cache: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, scale: float
) -> Call:
    q, out = torch.cat((latent, rope), -1), torch.empty_like(latent)
    return lambda: ops.mla_decode_kvcache_cpu(out, q, cache, scale, table, lengths)


def _kv_write(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Call:
    key_cache, value_cache, isa = _vllm_cache(keys)
    return lambda: ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)


RIVALS: Mapping[str, Callable[..., Call]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "swiglu": _swiglu,
    "rotary": _rotary,
    "moe_gate": _moe_gate,
    "dynamic_quant": _dynamic_quant,
    "top_k_top_p": _top_k_top_p,
    "paged_attention": _paged_attention,
    "mla_attention": _mla_attention,
    "kv_write": _kv_write,
}
