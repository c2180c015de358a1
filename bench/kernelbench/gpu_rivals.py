"""Public GPU kernels for the same work, where they can be imported: a call without arguments, by the package's name.

Written against the packages' own descriptions and not run by us. What one says when it fails is shown in its place.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]


def _flashinfer_norm(x: Tensor, weight: Tensor, eps: float) -> Call:
    norm = import_module("flashinfer").rmsnorm
    return lambda: norm(x, weight, eps)


def _torch_norm(x: Tensor, weight: Tensor, eps: float) -> Call:
    return lambda: torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def _flashinfer_add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Call:
    norm, x, residual = import_module("flashinfer").fused_add_rmsnorm, x.clone(), residual.clone()
    return lambda: norm(x, residual, weight, eps)


def _flashinfer_swiglu(gate_up: Tensor) -> Call:
    activate = import_module("flashinfer").silu_and_mul
    return lambda: activate(gate_up)


def _vllm_quant(x: Tensor) -> Call:
    quantize = import_module("vllm._custom_ops").scaled_int8_quant
    return lambda: quantize(x)


def _vllm_attention(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, scale: float
) -> Call:
    attend = import_module("vllm.vllm_flash_attn").flash_attn_varlen_func
    named = {
        "cu_seqlens_q": starts,
        "max_seqlen_q": int(starts.diff().max()),
        "seqused_k": lengths,
        "max_seqlen_k": int(lengths.max()),
        "block_table": table,
    }
    return lambda: attend(q, keys, values, softmax_scale=scale, causal=True, **named)


def _flash_attention(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, scale: float
) -> Call:
    attend = import_module("flash_attn").flash_attn_with_kvcache
    rows = q.unflatten(0, (len(lengths), -1))
    named = {"cache_seqlens": lengths, "block_table": table, "softmax_scale": scale, "causal": True}
    return lambda: attend(rows, keys, values, **named).flatten(0, 1)


def _flash_mla(
    latent: Tensor, rope: Tensor, cache: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, scale: float
) -> Call:
    package = import_module("flash_mla")
    q = torch.cat((latent, rope), -1).unflatten(0, (len(lengths), -1))
    plan = package.get_mla_metadata(lengths, q.shape[1] * q.shape[2], 1)
    named = {"softmax_scale": scale, "causal": True}
    return lambda: package.flash_mla_with_kvcache(
        q, cache.unsqueeze(2), table, lengths, latent.shape[2], *plan, **named
    )[0].flatten(0, 1)


def _torch_grouped(x: Tensor, weight: Tensor, sizes: Tensor) -> Call:
    ends = sizes.cumsum(0).int()
    return lambda: torch._grouped_mm(x, weight, offs=ends)


def _vllm_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, slots: Tensor) -> Call:
    experts = import_module("vllm.model_executor.layers.fused_moe").fused_experts
    return lambda: experts(x, gate_up, down, weights, slots)


def _vllm_top_k_top_p(logits: Tensor, k: Tensor, p: Tensor) -> Call:
    keep = import_module("vllm.v1.sample.ops.topk_topp_sampler").apply_top_k_top_p
    return lambda: keep(logits.clone(), k.long(), p)


def _vllm_write(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Call:
    write, one = import_module("vllm._custom_ops").reshape_and_cache_flash, torch.ones((), device=key.device)
    return lambda: write(key, value, keys, values, slots, "auto", one, one)


RIVALS: Mapping[str, Mapping[str, Callable[..., Call]]] = {
    "rms_norm": {"torch's own": _torch_norm, "flashinfer": _flashinfer_norm},
    "add_rms_norm": {"flashinfer": _flashinfer_add_norm},
    "swiglu": {"flashinfer": _flashinfer_swiglu},
    "dynamic_quant": {"vllm": _vllm_quant},
    "paged_attention": {"vllm's flash-attn": _vllm_attention, "flash-attn": _flash_attention},
    "mla_attention": {"flash-mla": _flash_mla},
    "grouped_matmul": {"torch's own": _torch_grouped},
    "moe_experts": {"vllm": _vllm_experts},
    "top_k_top_p": {"vllm": _vllm_top_k_top_p},
    "kv_write": {"vllm": _vllm_write},
}
