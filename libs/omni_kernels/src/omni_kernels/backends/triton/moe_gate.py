"""Routing of tokens to experts, their copies and the load per copy, one pass over the logits.

A program holds one token's experts as a (groups, experts of a group) tile and takes the best out of it `top_k` times.
It cannot raise: a chosen expert without a copy gets slot -1 and is not counted, as entries of other ranks are.

On Ascend: the counts rely on atomic additions of int64, which we have not seen work there. Not run on Ascend.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from omni_kernels.backends.triton.language import first_max, power_of_two, programs
from omni_kernels.ops.moe_gate import EPS, GOLDEN

_GOLDEN = tl.constexpr(GOLDEN)
_EPS = tl.constexpr(EPS)


@triton.jit
def _limit_groups(choice, index, is_expert, KEPT: tl.constexpr, SUM_OF_TWO: tl.constexpr, GROUPS: tl.constexpr):
    """`choice` with -inf outside of the best KEPT groups, a group worth its best expert or the sum of its two best."""
    best, at = first_max(choice, index, 1)
    worth = best
    if SUM_OF_TWO:
        worth = worth + tl.max(tl.where(index == at, float("-inf"), choice), axis=1, keep_dims=True)
    group = tl.arange(0, GROUPS)[:, None]
    kept = group < 0
    for _ in range(KEPT):
        first = first_max(worth, group, 0)[1]
        kept = kept | (group == first)
        worth = tl.where(group == first, float("-inf"), worth)
    return tl.where(kept & is_expert, choice, float("-inf"))


@triton.jit
def _copy_of(replicas, expert, is_choice, token_index, COPIES: tl.constexpr, COPIES_BLOCK: tl.constexpr):
    """The copy that Fibonacci hashing of token and expert picks among the expert's, -1 where it has none."""
    column = tl.arange(0, COPIES_BLOCK)
    listed = tl.load(
        replicas + expert[:, None] * COPIES + column[None, :],
        mask=is_choice[:, None] & (column < COPIES)[None, :],
        other=-1,
    )
    count = tl.sum((listed >= 0).to(tl.int64), axis=1)
    fraction = ((expert.to(tl.int64) + token_index) * _GOLDEN) & 0xFFFFFFFF
    copy = (fraction * count) >> 32
    return tl.max(tl.where(column[None, :] == copy[:, None], listed, -1), axis=1).to(tl.int32)


@triton.jit
def _route(
    logits, bias, replicas, real_tokens, weights, experts, slots, counts, tokens, num_slots, token_offset, scale,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SIGMOID: tl.constexpr, BIASED: tl.constexpr, PER_GROUP: tl.constexpr,
    KEPT_GROUPS: tl.constexpr, RENORMALIZE: tl.constexpr, COPIES: tl.constexpr, PADDED: tl.constexpr,
    GROUPS: tl.constexpr, PER_GROUP_BLOCK: tl.constexpr, TOP_K_BLOCK: tl.constexpr, COPIES_BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.arange(0, GROUPS)[:, None]
    member = tl.arange(0, PER_GROUP_BLOCK)[None, :]
    index = group * PER_GROUP + member
    is_expert = (member < PER_GROUP) & (index < EXPERTS)
    rank = tl.arange(0, TOP_K_BLOCK)
    for token in range(tl.program_id(0).to(tl.int64), tokens, tl.num_programs(0)):
        x = tl.load(logits + token * EXPERTS + index, mask=is_expert, other=float("-inf")).to(tl.float32)
        if SIGMOID:
            score = 1.0 / (1.0 + tl.exp(-x))
        else:
            score = tl.exp(x - tl.max(x))
            score = score / tl.sum(score)
        choice = x
        if BIASED:
            choice = score + tl.load(bias + index, mask=is_expert, other=0.0)
            choice = tl.where(is_expert, choice, float("-inf"))
        if KEPT_GROUPS * PER_GROUP < EXPERTS:
            choice = _limit_groups(choice, index, is_expert, KEPT_GROUPS, BIASED, GROUPS)

        expert = tl.zeros((TOP_K_BLOCK,), tl.int32)
        weight = tl.zeros((TOP_K_BLOCK,), tl.float32)
        for i in range(TOP_K):
            at = tl.min(tl.where(choice == tl.max(choice), index, EXPERTS - 1))  # what is no number equals nothing
            worth = tl.sum(tl.where(index == at, score, 0.0))
            expert = tl.where(rank == i, at, expert)
            weight = tl.where(rank == i, worth, weight)
            choice = tl.where(index == at, float("-inf"), choice)
        if RENORMALIZE:
            weight = weight / (tl.sum(weight, axis=0) + _EPS)

        is_choice = rank < TOP_K
        slot = expert
        if COPIES > 0:
            slot = _copy_of(replicas, expert, is_choice, token_offset + token, COPIES, COPIES_BLOCK)
        tl.store(weights + token * TOP_K + rank, weight * scale, mask=is_choice)
        tl.store(experts + token * TOP_K + rank, expert, mask=is_choice)
        tl.store(slots + token * TOP_K + rank, slot, mask=is_choice)
        is_counted = is_choice & (slot >= 0) & (slot < num_slots)
        if PADDED:
            is_counted = is_counted & (rank + token < tl.load(real_tokens) + rank)
        tl.atomic_add(counts + slot, tl.full((TOP_K_BLOCK,), 1, tl.int64), mask=is_counted)


def moe_gate(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_k_groups: int,
    renormalize: bool,
    scale: float,
    replicas: Tensor | None,
    num_slots: int,
    token_offset: int,
    real_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, num_experts = logits.shape
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    experts = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    slots = torch.empty_like(experts)
    counts = torch.zeros(num_slots, dtype=torch.int64, device=logits.device)
    if tokens == 0:
        return weights, experts, slots, counts
    copies = 0 if replicas is None else replicas.shape[1]
    _route[programs(tokens)](
        logits, logits if bias is None else bias, counts if replicas is None else replicas,
        counts if real_tokens is None else real_tokens, weights, experts, slots, counts,
        tokens, num_slots, token_offset, scale,
        EXPERTS=num_experts, TOP_K=top_k, SIGMOID=scoring == "sigmoid", BIASED=bias is not None,
        PER_GROUP=num_experts // num_groups, KEPT_GROUPS=top_k_groups, RENORMALIZE=renormalize, COPIES=copies,
        PADDED=real_tokens is not None, GROUPS=power_of_two(num_groups),
        PER_GROUP_BLOCK=power_of_two(num_experts // num_groups), TOP_K_BLOCK=power_of_two(top_k),
        COPIES_BLOCK=power_of_two(copies), num_warps=1 if num_experts <= 256 else 4,
    )  # fmt: skip
    return weights, experts, slots, counts


KERNELS: Mapping[str, Callable[..., Any]] = {"moe_gate": moe_gate}
