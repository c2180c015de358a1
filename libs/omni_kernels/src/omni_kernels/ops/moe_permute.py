"""Tokens to their experts' rows and back: sort copies of the tokens by slot, add up what the experts made of them."""

from collections.abc import Iterator

import torch
from torch import Tensor, device

from omni_kernels.case import DEEPSEEK_V3, MODELS, QWEN3_MOE, TINY, Case, ModelShape, declare
from omni_kernels.checks import (
    FLOATS,
    has_dims,
    has_dtype,
    has_shape,
    is_contiguous,
    is_positive,
    on_device_of,
    refuse,
    wide,
)


def _moe_permute(x: Tensor, slots: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """One row of x (T, H) for each of its `slots` int32 (T, k), sorted by slot; rows of one slot in order of tokens.

    Slots outside of 0 .. num_slots - 1 are somebody else's: their rows stand behind all others, and are zero.

    Returns rows (T * k, H), the pair each row stands for as token * k + choice, int32 (T * k,), and the number of rows
    of each slot, int64 (num_slots,).
    """
    pairs = slots.flatten().long()
    key = torch.where((pairs >= 0) & (pairs < num_slots), pairs, num_slots)
    order, source = key.sort(stable=True)
    rows = x[source // slots.shape[1]].masked_fill_((order == num_slots).unsqueeze(1), 0)
    sizes = key.new_zeros(num_slots + 1).scatter_add_(0, key, torch.ones_like(key))
    return rows, source.int(), sizes[:num_slots]


def _fake_permute(x: Tensor, slots: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    pairs = slots.numel()
    rows = x.new_empty(pairs, x.shape[1])
    return rows, x.new_empty(pairs, dtype=torch.int32), x.new_empty(num_slots, dtype=torch.int64)


def _check_permute(x: Tensor, slots: Tensor, num_slots: int) -> None:
    has_dims("x", x, 2)
    has_dtype("x", x, *FLOATS, torch.int8)
    is_contiguous("x", x)
    has_dtype("slots", slots, torch.int32)
    has_shape("slots", slots, (x.shape[0], -1))
    is_contiguous("slots", slots)
    on_device_of("slots", slots, x)
    if slots.shape[1] == 0:
        refuse("slots", "must name a slot for each token", tuple(slots.shape))
    is_positive("num_slots", num_slots)


def _moe_combine(rows: Tensor, source: Tensor, weights: Tensor, residual: Tensor | None) -> Tensor:
    """The sum over each token's rows times their weights, plus `residual` (T, H): (T, H) in the dtype of `rows`.

    rows (T * k, H) and source int32 (T * k,) are as `moe_permute` gives them: `source` is a permutation. Weights are
    float32 (T, k). Adds in float32 and rounds once.
    """
    tokens, top_k = weights.shape
    position = torch.empty_like(source, dtype=torch.int64)
    position[source.long()] = torch.arange(len(source), device=source.device)
    picked = wide(rows)[position].unflatten(0, (tokens, top_k))
    total = (picked * weights.unsqueeze(-1)).sum(1)
    combined: Tensor = (total if residual is None else total + residual).to(rows.dtype)
    return combined


def _fake_combine(rows: Tensor, source: Tensor, weights: Tensor, residual: Tensor | None) -> Tensor:
    return rows.new_empty(weights.shape[0], rows.shape[1])


def _check_combine(rows: Tensor, source: Tensor, weights: Tensor, residual: Tensor | None) -> None:
    has_dims("rows", rows, 2)
    has_dtype("rows", rows, *FLOATS)
    is_contiguous("rows", rows)
    has_dims("weights", weights, 2)
    has_dtype("weights", weights, torch.float32)
    is_contiguous("weights", weights)
    on_device_of("weights", weights, rows)
    if weights.numel() != rows.shape[0] or weights.shape[1] == 0:
        refuse("weights", f"must have an entry for each of the {rows.shape[0]} rows", tuple(weights.shape))
    has_dtype("source", source, torch.int32)
    has_shape("source", source, (rows.shape[0],))
    is_contiguous("source", source)
    on_device_of("source", source, rows)
    if residual is not None:
        has_dtype("residual", residual, rows.dtype)
        has_shape("residual", residual, (weights.shape[0], rows.shape[1]))
        is_contiguous("residual", residual)
        on_device_of("residual", residual, rows)


def _random_slots(model: ModelShape, tokens: int, generator: torch.Generator) -> Tensor:
    """Experts of each token, no two alike, with some experts much more often chosen than others."""
    worth = torch.rand(tokens, model.experts, generator=generator) * torch.rand(model.experts, generator=generator)
    return worth.topk(model.top_k, dim=-1).indices.int()


def _permute_samples(where: device) -> Iterator[Case]:
    generator = torch.Generator(device="cpu").manual_seed(0)

    def case(name: str, model: ModelShape, tokens: int, dtype: torch.dtype, num_slots: int, first: int = 0) -> Case:
        x = torch.randn(tokens, model.hidden, generator=generator).mul_(30).to(where, dtype)
        slots = (_random_slots(model, tokens, generator) - first).to(where)
        return Case(f"moe_permute-{model.name}-{name}", (x, slots, num_slots), 0.0, 0.0)

    for model in MODELS:
        yield case("float32", model, 5, torch.float32, model.experts)
        yield case("bfloat16", model, 5, torch.bfloat16, model.experts)
    yield case("rank-of-four", QWEN3_MOE, 17, torch.bfloat16, QWEN3_MOE.experts // 4, QWEN3_MOE.experts // 4)
    yield case("int8", DEEPSEEK_V3, 3, torch.int8, DEEPSEEK_V3.experts)
    yield case("nothing-local", TINY, 3, torch.float16, 4, 100)
    yield case("one-token", TINY, 1, torch.float32, TINY.experts)
    yield case("no-token", TINY, 0, torch.float32, TINY.experts)


def _combine_samples(where: device) -> Iterator[Case]:
    generator = torch.Generator(device="cpu").manual_seed(0)

    def case(name: str, model: ModelShape, tokens: int, dtype: torch.dtype, *, shared: bool, local: int) -> Case:
        slots = _random_slots(model, tokens, generator)
        rows, source, sizes = _moe_permute(torch.zeros(tokens, model.hidden, dtype=dtype), slots, local)
        held = int(sizes.sum())
        rows[:held] = torch.randn(held, model.hidden, generator=generator).to(dtype)
        weights = torch.rand(tokens, model.top_k, generator=generator)
        residual = torch.randn(tokens, model.hidden, generator=generator).to(where, dtype) if shared else None
        inputs = (rows.to(where), source.to(where), weights.to(where), residual)
        tolerance = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 1.6e-2), torch.float16: (1e-3, 1e-3)}[dtype]
        return Case(f"moe_combine-{model.name}-{name}", inputs, *tolerance)

    for model in MODELS:
        yield case("float32", model, 5, torch.float32, shared=False, local=model.experts)
        yield case("bfloat16", model, 5, torch.bfloat16, shared=True, local=model.experts)
    yield case("rank-of-four", QWEN3_MOE, 17, torch.bfloat16, shared=True, local=QWEN3_MOE.experts // 4)
    yield case("float16", TINY, 3, torch.float16, shared=True, local=TINY.experts)
    yield case("one-token", TINY, 1, torch.float32, shared=True, local=TINY.experts)
    yield case("no-token", TINY, 0, torch.float32, shared=False, local=TINY.experts)


MOE_PERMUTE = declare("moe_permute", _moe_permute, _fake_permute, _check_permute, _permute_samples)
MOE_COMBINE = declare("moe_combine", _moe_combine, _fake_combine, _check_combine, _combine_samples)
moe_permute = MOE_PERMUTE.call
moe_combine = MOE_COMBINE.call

OPS = (MOE_PERMUTE, MOE_COMBINE)
