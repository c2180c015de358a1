"""Routing of tokens to experts: scores, choice, weights, copies and load in one op."""

from collections.abc import Iterator

import torch
from torch import Tensor, device

from omni_kernels.case import DEEPSEEK_V3, PANGU_ULTRA_MOE, QWEN3_MOE, TINY, Case, ModelShape, declare
from omni_kernels.checks import (
    FLOATS,
    has_dims,
    has_dtype,
    has_shape,
    in_range,
    is_contiguous,
    is_one_of,
    is_positive,
    on_device_of,
    refuse,
    wide,
)

GOLDEN = 2654435769
"""2^32 over the golden ratio: its successive multiples fall evenly over the 32-bit range."""
EPS = 1e-20
"""Keeps a renormalised row whose scores are all 0 from being NaN."""


def _moe_gate(
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
    """Choose `top_k` experts of each token, the copy of each that computes it, and count tokens per copy.

    Scores are the "softmax" or "sigmoid" of logits (T, E). Experts are chosen by score, or by score + bias where
    there is a float32 bias (E,); the bias has no part in the weights. With num_groups > 1 only experts of the best
    `top_k_groups` groups are eligible: a group of consecutive experts is worth its best expert, or with a bias the sum
    of its two best (DeepSeek-V2 and -V3 technical reports). Of equals the lower number wins. Weights are the scores
    of the chosen, divided by their sum if `renormalize`, times `scale`.

    Row e of `replicas` (E, R), int32 or int64, lists the physical slots that hold a copy of expert e, -1 behind the
    last one. Of n copies the token of index i, counted from `token_offset`, takes number floor(frac(g (i + e)) n),
    g = 2654435769 / 2^32, the golden ratio's fraction: Fibonacci hashing (Knuth, TAOCP 3, 6.4), which spreads any run
    of consecutive tokens evenly and is the same on every rank. Engines with movable experts choose by the same function
    (`omni_engine.vllm_expert_shims.map_and_record`). Without replicas expert e lies in slot e.

    Tokens from index `real_tokens` on, a scalar int32, are padding: routed, not counted.

    Returns weights float32 (T, top_k), best first, logical experts int32 (T, top_k), physical slots int32 (T, top_k),
    and tokens per slot int64 (num_slots,). Computes in float32.
    Raises ValueError when an expert that is chosen has no slot, or one outside of 0 .. num_slots - 1.
    """
    logits = wide(logits)
    choice = logits if bias is None else _scores(logits, scoring) + bias
    if num_groups > 1:
        choice = _limit_groups(choice, num_groups, top_k_groups, 1 if bias is None else 2)
    chosen = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = _scores(logits, scoring).gather(1, chosen)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + EPS)
    slots = chosen if replicas is None else _copies(chosen, replicas, token_offset)
    if slots.numel() and not 0 <= int(slots.min()) <= int(slots.max()) < num_slots:
        refuse("replicas", f"every chosen expert needs slots from 0 to {num_slots - 1}", "-1 or one beyond")
    return weights * scale, chosen.int(), slots.int(), _counts(slots, num_slots, real_tokens)


def _scores(logits: Tensor, scoring: str) -> Tensor:
    return logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()


def _limit_groups(choice: Tensor, groups: int, kept: int, best: int) -> Tensor:
    grouped: Tensor = choice.unflatten(1, (groups, -1))
    worth = grouped.topk(best, dim=-1).values.sum(-1)
    order = worth.sort(dim=-1, descending=True, stable=True).indices
    out = torch.ones_like(worth, dtype=torch.bool).scatter_(1, order[:, :kept], False)
    return grouped.masked_fill(out.unsqueeze(-1), float("-inf")).flatten(1)


def _copies(chosen: Tensor, replicas: Tensor, token_offset: int) -> Tensor:
    index = torch.arange(token_offset, token_offset + len(chosen), device=chosen.device).unsqueeze(1) + chosen
    fraction = (index * GOLDEN) & 0xFFFFFFFF
    count = (replicas >= 0).sum(-1)
    return replicas[chosen, (fraction * count[chosen]) >> 32].long()


def _counts(slots: Tensor, num_slots: int, real_tokens: Tensor | None) -> Tensor:
    ones = torch.ones_like(slots, dtype=torch.int64)
    if real_tokens is not None:
        ones = ones * (torch.arange(len(slots), device=slots.device) < real_tokens).unsqueeze(1)
    return ones.new_zeros(num_slots).scatter_add_(0, slots.flatten(), ones.flatten())


def _fake(
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
    experts = logits.new_empty(logits.shape[0], top_k, dtype=torch.int32)
    counts = logits.new_empty(num_slots, dtype=torch.int64)
    return torch.empty_like(experts, dtype=torch.float32), experts, torch.empty_like(experts), counts


def _check(
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
) -> None:
    has_dims("logits", logits, 2)
    has_dtype("logits", logits, *FLOATS)
    is_contiguous("logits", logits)
    experts = logits.shape[1]
    is_one_of("scoring", scoring, ("softmax", "sigmoid"))
    is_positive("num_groups", num_groups)
    if experts == 0 or experts % num_groups:
        refuse("num_groups", f"must divide the {experts} experts", num_groups)
    in_range("top_k_groups", top_k_groups, 1, num_groups)
    in_range("top_k", top_k, 1, experts // num_groups * top_k_groups)
    is_positive("scale", scale)
    if token_offset < 0:
        refuse("token_offset", "must not be negative", token_offset)
    if bias is not None:
        has_dtype("bias", bias, torch.float32)
        has_shape("bias", bias, (experts,))
        is_contiguous("bias", bias)
        on_device_of("bias", bias, logits)
        if num_groups == experts > 1:
            refuse("num_groups", "groups must have two experts or more where there is a bias", num_groups)
    if replicas is not None:
        _check_replicas(replicas, logits, num_slots)
    elif num_slots != experts:
        refuse("num_slots", f"without replicas must be the {experts} experts", num_slots)
    if real_tokens is not None:
        has_dtype("real_tokens", real_tokens, torch.int32)
        has_shape("real_tokens", real_tokens, ())
        on_device_of("real_tokens", real_tokens, logits)


def _check_replicas(replicas: Tensor, logits: Tensor, num_slots: int) -> None:
    has_dtype("replicas", replicas, torch.int32, torch.int64)
    has_shape("replicas", replicas, (logits.shape[1], -1))
    is_contiguous("replicas", replicas)
    on_device_of("replicas", replicas, logits)
    if replicas.shape[1] == 0:
        refuse("replicas", "must have room for a slot", tuple(replicas.shape))
    is_positive("num_slots", num_slots)


def _samples(where: device) -> Iterator[Case]:
    generator = torch.Generator(device="cpu").manual_seed(0)

    def case(
        name: str,
        model: ModelShape,
        tokens: int,
        scoring: str,
        scale: float,
        *,
        biased: bool = False,
        renormalize: bool = True,
        dtype: torch.dtype = torch.float32,
        copies: int = 0,
        offset: int = 0,
        real: int | None = None,
    ) -> Case:
        logits = torch.randn(tokens, model.experts, generator=generator).to(where, dtype)
        bias = (torch.randn(model.experts, generator=generator) / 10).to(where) if biased else None
        replicas = spare_copies(model.experts, copies, generator).to(where) if copies else None
        slots = model.experts if replicas is None else int(replicas.max()) + 1
        real_tokens = None if real is None else torch.tensor(real, dtype=torch.int32, device=where)
        groups = (model.groups, model.top_k_groups)
        inputs = (logits, bias, model.top_k, scoring, *groups, renormalize, scale, replicas, slots, offset, real_tokens)
        return Case(f"moe_gate-{model.name}-{name}", inputs, 1e-6, 1e-5)

    yield case("float32", DEEPSEEK_V3, 7, "sigmoid", 2.5, biased=True)
    yield case("bfloat16", DEEPSEEK_V3, 7, "sigmoid", 2.5, biased=True, dtype=torch.bfloat16)
    yield case("copies", DEEPSEEK_V3, 33, "sigmoid", 2.5, biased=True, copies=32, offset=5, real=20)
    yield case("float32", PANGU_ULTRA_MOE, 7, "sigmoid", 2.5)
    yield case("float32", QWEN3_MOE, 7, "softmax", 1.0)
    yield case("bfloat16", QWEN3_MOE, 7, "softmax", 1.0, dtype=torch.bfloat16)
    yield case("copies", QWEN3_MOE, 65, "softmax", 1.0, copies=16, real=0)
    yield case("not-renormalized", QWEN3_MOE, 3, "softmax", 1.0, renormalize=False)
    yield case("softmax-groups", TINY, 5, "softmax", 16.0, renormalize=False)
    yield case("softmax-bias", TINY, 5, "softmax", 1.0, biased=True)
    yield case("sigmoid-not-renormalized", TINY, 5, "sigmoid", 1.0, renormalize=False, dtype=torch.float16)
    yield case("one-token", TINY, 1, "softmax", 1.0, copies=8)
    yield case("no-token", TINY, 0, "sigmoid", 1.0, biased=True, copies=3)


def spare_copies(experts: int, spare: int, generator: torch.Generator) -> Tensor:
    """`replicas` int32 (experts, 3) where `spare` slots behind those of the experts hold copies of random ones."""
    replicas = torch.full((experts, 3), -1, dtype=torch.int32)
    replicas[:, 0] = torch.arange(experts)
    twice = torch.randperm(2 * experts, generator=generator)[:spare].sort().values
    for slot, pick in enumerate(twice.tolist(), start=experts):
        row = replicas[pick % experts]
        row[int((row >= 0).sum())] = slot
    return replicas


MOE_GATE = declare("moe_gate", _moe_gate, _fake, _check, _samples)
moe_gate = MOE_GATE.call

OPS = (MOE_GATE,)
