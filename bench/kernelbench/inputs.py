"""Inputs that ops are timed on: one decode step or a short prompt of published models, bfloat16."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from omni_kernels.case import DEEPSEEK_V3, QWEN3_MOE, TINY, ModelShape
from omni_kernels.ops import OPS

BLOCK = 128
Inputs = dict[str, tuple[Any, ...]]
"""Name of a case -> arguments of the op."""

_CPU = torch.device("cpu")


def inputs_of(op: str, tokens: int) -> Inputs:
    """Cases of an op at `tokens` tokens; where none are written here, the largest of its own samples."""
    if op in INPUTS:
        return INPUTS[op](tokens)
    cases = list(OPS[op].samples(_CPU))
    largest = max(cases, key=lambda case: sum(x.numel() for x in case.inputs if isinstance(x, Tensor)))
    return {largest.name: largest.inputs}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def paging(sequences: int, length: int, rows: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Block table, query starts and lengths of sequences that each have `rows` newest rows in the batch."""
    blocks = -(-length // size)
    table = torch.randperm(sequences * blocks, generator=torch.Generator().manual_seed(0)).view(sequences, blocks)
    starts = torch.arange(0, (sequences + 1) * rows, rows, dtype=torch.int32)
    return table.int(), starts, torch.full((sequences,), length, dtype=torch.int32)


def _norm(tokens: int) -> Inputs:
    return {m.name: (normal(tokens, m.hidden), normal(m.hidden), 1e-6) for m in (TINY, QWEN3_MOE, DEEPSEEK_V3)}


def _add_norm(tokens: int) -> Inputs:
    return {
        m.name: (normal(tokens, m.hidden), normal(tokens, m.hidden), normal(m.hidden), 1e-6)
        for m in (TINY, QWEN3_MOE, DEEPSEEK_V3)
    }


def _swiglu(tokens: int) -> Inputs:
    return {m.name: (normal(tokens, 2 * m.intermediate),) for m in (TINY, QWEN3_MOE, DEEPSEEK_V3)}


def _rotary(tokens: int) -> Inputs:
    def one(heads: int, size: int, interleaved: bool) -> tuple[Any, ...]:
        angles = torch.arange(tokens).unsqueeze(1) / 1e4 ** (torch.arange(size // 2) / (size // 2))
        cos, sin = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
        return normal(tokens, heads, size), cos, sin, interleaved

    return {
        QWEN3_MOE.name: one(QWEN3_MOE.heads, QWEN3_MOE.head_dim, False),
        DEEPSEEK_V3.name: one(DEEPSEEK_V3.heads, DEEPSEEK_V3.rope, True),
    }


def replicas(shape: ModelShape) -> Tensor:
    """Every expert once, and the first eighth of them twice: int64 (experts, 2), -1 where there is no second."""
    table = torch.full((shape.experts, 2), -1)
    table[:, 0] = torch.arange(shape.experts)
    spare = shape.experts // 8
    table[:spare, 1] = torch.arange(shape.experts, shape.experts + spare)
    return table


def _gate(tokens: int) -> Inputs:
    q, d = QWEN3_MOE, DEEPSEEK_V3
    slots = q.experts + q.experts // 8
    grouped = (d.top_k, "sigmoid", d.groups, d.top_k_groups, True, 2.5)
    table = replicas(d)
    return {
        q.name: (normal(tokens, q.experts), None, q.top_k, "softmax", 1, 1, True, 1.0, None, q.experts, 0),
        f"{q.name}, copies": (
            *(normal(tokens, q.experts), None, q.top_k, "softmax", 1, 1, True, 1.0),
            *(replicas(q), slots, 0),
        ),
        f"{d.name}, copies": (
            *(normal(tokens, d.experts).float(), torch.rand(d.experts), *grouped),
            *(table, d.experts + d.experts // 8, 0),
        ),
    }


def _quant(tokens: int) -> Inputs:
    return {m.name: (normal(tokens, m.hidden),) for m in (QWEN3_MOE, DEEPSEEK_V3)}


def _sampling(tokens: int) -> Inputs:
    vocabulary = 151_936
    logits = torch.randn(min(tokens, 16), vocabulary, generator=torch.Generator().manual_seed(0))
    rows = len(logits)
    return {"qwen3 vocabulary": (logits, torch.full((rows,), 50, dtype=torch.int32), torch.full((rows,), 0.9))}


def _attention(tokens: int) -> Inputs:
    m = QWEN3_MOE

    def one(sequences: int, length: int, rows: int) -> tuple[Any, ...]:
        table, starts, lengths = paging(sequences, length, rows, BLOCK)
        cache = normal(table.numel(), m.kv_heads, BLOCK, 2 * m.head_dim).transpose(1, 2)
        keys, values = cache[..., : m.head_dim], cache[..., m.head_dim :]
        q = normal(sequences * rows, m.heads, m.head_dim)
        return q, keys, values, table, starts, lengths, m.head_dim**-0.5

    return {f"{m.name}, decode at 1,024": one(tokens, 1024, 1), f"{m.name}, prompt of 256": one(1, 256, 256)}


def _latent(tokens: int) -> Inputs:
    m, heads = DEEPSEEK_V3, 16
    table, starts, lengths = paging(tokens, 1024, 1, 16)
    cache = normal(table.numel(), 16, m.rank + m.rope)
    queries = normal(tokens, heads, m.rank), normal(tokens, heads, m.rope)
    return {f"{m.name}, {heads} heads, decode at 1,024": (*queries, cache, table, starts, lengths, 192**-0.5)}


def _write(tokens: int) -> Inputs:
    m = QWEN3_MOE
    cache = normal(16, m.kv_heads, BLOCK, 2 * m.head_dim).transpose(1, 2)
    slots = torch.randperm(16 * BLOCK, generator=torch.Generator().manual_seed(0))[:tokens]
    keys, values = cache[..., : m.head_dim], cache[..., m.head_dim :]
    new = normal(tokens, m.kv_heads, m.head_dim)
    return {m.name: (new, new, keys, values, slots)}


INPUTS: Mapping[str, Callable[[int], Inputs]] = {
    "rms_norm": _norm,
    "add_rms_norm": _add_norm,
    "swiglu": _swiglu,
    "rotary": _rotary,
    "moe_gate": _gate,
    "dynamic_quant": _quant,
    "top_k_top_p": _sampling,
    "paged_attention": _attention,
    "mla_attention": _latent,
    "kv_write": _write,
}
