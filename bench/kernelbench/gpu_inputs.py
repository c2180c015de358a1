"""Inputs for a GPU: those of the CPU's bench moved there, and sizes of a serving step where that one has none."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kernelbench.inputs import BLOCK, INPUTS, Inputs, inputs_of, normal, paging
from omni_kernels.case import DEEPSEEK_V3, QWEN3_MOE
from omni_kernels.ops.moe_permute import moe_permute

LENGTH = 4096
"""Cached tokens of a sequence that decodes."""


def gpu_inputs_of(op: str, tokens: int) -> Inputs:
    """Cases of an op at `tokens` tokens, on the GPU."""
    cases = GPU_INPUTS[op](tokens) if op in GPU_INPUTS else inputs_of(op, tokens)
    return {
        name: tuple(value.cuda() if isinstance(value, Tensor) else value for value in inputs)
        for name, inputs in cases.items()
    }


def depends_on_tokens(op: str) -> bool:
    return op in GPU_INPUTS or op in INPUTS


def _int8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)


def _slots(tokens: int) -> Tensor:
    m = QWEN3_MOE
    return torch.rand(tokens, m.experts, generator=torch.Generator().manual_seed(0)).topk(m.top_k).indices.int()


def _sizes(tokens: int) -> Tensor:
    return torch.bincount(_slots(tokens).flatten().long(), minlength=QWEN3_MOE.experts)


def _weights(columns: int) -> Tensor:
    m = QWEN3_MOE
    return normal(m.experts, m.hidden, columns) / m.hidden**0.5


def _products(tokens: int) -> Inputs:
    m = QWEN3_MOE
    return {m.name: (normal(tokens * m.top_k, m.hidden), _weights(2 * m.intermediate), _sizes(tokens))}


def _products_int8(tokens: int) -> Inputs:
    m = QWEN3_MOE
    rows, columns = tokens * m.top_k, 2 * m.intermediate
    scales = torch.rand(rows) / 100, torch.rand(m.experts, columns) / 100
    weight = _int8(m.experts, m.hidden, columns)
    return {m.name: (_int8(rows, m.hidden), scales[0], weight, scales[1], _sizes(tokens), torch.bfloat16)}


def _products_int4(tokens: int) -> Inputs:
    m = QWEN3_MOE
    rows, columns = tokens * m.top_k, 2 * m.intermediate
    scales = torch.rand(rows) / 100, torch.rand(m.experts, m.hidden // 128, columns) / 100
    weight = _int8(m.experts, m.hidden, columns // 2)
    return {
        f"{m.name}, groups of 128": (
            _int8(rows, m.hidden),
            scales[0],
            weight,
            scales[1],
            _sizes(tokens),
            torch.bfloat16,
        )
    }


def _experts(tokens: int) -> Inputs:
    m = QWEN3_MOE
    gate_up = _weights(2 * m.intermediate).transpose(1, 2).contiguous()
    down = normal(m.experts, m.hidden, m.intermediate) / m.intermediate**0.5
    return {m.name: (normal(tokens, m.hidden), gate_up, down, torch.rand(tokens, m.top_k), _slots(tokens))}


def _permute(tokens: int) -> Inputs:
    return {QWEN3_MOE.name: (normal(tokens, QWEN3_MOE.hidden), _slots(tokens), QWEN3_MOE.experts)}


def _combine(tokens: int) -> Inputs:
    rows, source, _ = moe_permute(*_permute(tokens)[QWEN3_MOE.name])
    return {QWEN3_MOE.name: (rows, source, torch.rand(tokens, QWEN3_MOE.top_k), None)}


def _attention(tokens: int) -> Inputs:
    m = QWEN3_MOE
    sequences = min(tokens, 64)
    table, starts, lengths = paging(sequences, LENGTH, tokens // sequences, BLOCK)
    caches = [normal(table.numel(), BLOCK, m.kv_heads, m.head_dim) for _ in range(2)]
    q = normal(sequences * (tokens // sequences), m.heads, m.head_dim)
    return {f"{m.name}, {sequences} sequences of {LENGTH}": (q, *caches, table, starts, lengths, m.head_dim**-0.5)}


def _sparse(tokens: int) -> Inputs:
    return {f"{name}, 128 + 1024": (*inputs, 128, 1024) for name, inputs in _attention(tokens).items()}


def _latent(tokens: int) -> Inputs:
    m = DEEPSEEK_V3
    sequences = min(tokens, 64)
    table, starts, lengths = paging(sequences, LENGTH, tokens // sequences, 64)
    queries = [normal(sequences * (tokens // sequences), m.heads, size) for size in (m.rank, m.rope)]
    cache = normal(table.numel(), 64, m.rank + m.rope)
    return {f"{m.name}, {sequences} sequences of {LENGTH}": (*queries, cache, table, starts, lengths, 192**-0.5)}


def _sparse_latent(tokens: int) -> Inputs:
    chosen = torch.arange(2048, dtype=torch.int32)
    return {
        f"{name}, 2048 chosen": (*inputs[:6], chosen.repeat(len(inputs[0]), 1), inputs[6])
        for name, inputs in _latent(min(tokens, 64)).items()
    }


def _indexer(tokens: int) -> Inputs:
    table, starts, lengths = paging(min(tokens, 64), LENGTH, 1, 64)
    rows = len(lengths)
    inputs = normal(rows, 64, 128), torch.rand(rows, 64), normal(table.numel(), 64, 128), table, starts, lengths, 2048
    return {f"deepseek-v3.2, {rows} sequences of {LENGTH}": inputs}


GPU_INPUTS: Mapping[str, Callable[[int], dict[str, tuple[Any, ...]]]] = {
    "grouped_matmul": _products,
    "grouped_matmul_w8a8": _products_int8,
    "grouped_matmul_w4a8": _products_int4,
    "moe_experts": _experts,
    "moe_permute": _permute,
    "moe_combine": _combine,
    "paged_attention": _attention,
    "sink_recent_attention": _sparse,
    "mla_attention": _latent,
    "sparse_mla_attention": _sparse_latent,
    "indexer_top_k": _indexer,
}
