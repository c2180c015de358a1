"""Choice of the next token, and verification of drafted ones.

Top-k and top-p need no sorted row: both ask for the largest value such that what lies below it is no more than a limit,
in tokens or in probability. A program narrows that value down over the 2^32 keys that order as floats do, four ways in
each of 16 passes over its row. Sums run in float32, so at the edge of top-p a token may fall on the other side than in
float64, where the difference is within rounding.

On Ascend: int64 scalars in the search, and tl.cumsum over 4096 tokens. Not run on Ascend.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from omni_kernels.backends.triton.language import LOG2_E, first_max, power_of_two

_BLOCK = 4096
_PASSES = tl.constexpr(16)


@triton.jit
def _key(x):
    """A whole number that orders as float32 `x` does; 0 and -0 are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _edge(row, width, low, high, limit, peak, least, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key from `low` to `high` (int64) such that what has smaller keys adds up to at most `limit`.

    COUNT adds up tokens, else exp2((x - peak) * log2 e) of those with keys of `least` and more.
    """
    columns = tl.arange(0, BLOCK)
    for _ in range(_PASSES):
        step = (high - low + 4) >> 2
        first = tl.minimum(low + step, high)
        second = tl.minimum(low + 2 * step, high)
        third = tl.minimum(low + 3 * step, high)
        below_first = tl.zeros((BLOCK,), tl.float32)
        below_second = tl.zeros((BLOCK,), tl.float32)
        below_third = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            x = tl.load(row + start + columns, mask=start + columns < width, other=float("-inf"))
            key = _key(x)
            if COUNT:
                worth = tl.where(start + columns < width, 1.0, 0.0)
            else:
                worth = tl.where(key >= least, tl.exp2((x - peak) * LOG2_E), 0.0)
            below_first += tl.where(key < first.to(tl.int32), worth, 0.0)
            below_second += tl.where(key < second.to(tl.int32), worth, 0.0)
            below_third += tl.where(key < third.to(tl.int32), worth, 0.0)
        if tl.sum(below_third, axis=0) <= limit:
            low = third
        elif tl.sum(below_second, axis=0) <= limit:
            low = second
            high = third - 1
        elif tl.sum(below_first, axis=0) <= limit:
            low = first
            high = second - 1
        else:
            high = first - 1
    return low


@triton.jit
def _choose(logits, k, p, noise, out, width, DRAW: tl.constexpr, BLOCK: tl.constexpr):
    """A row of logits with -inf for what top-k and top-p leave out, or, with DRAW, the token drawn of the rest."""
    seq = tl.program_id(0).to(tl.int64)
    row = logits + seq * width
    columns = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, width, BLOCK):
        x = tl.load(row + start + columns, mask=start + columns < width, other=float("-inf"))
        largest = tl.maximum(largest, x)
    peak = tl.max(largest, axis=0)
    top = _key(peak)
    bottom = tl.full((), -0x80000000, tl.int64)

    count = tl.load(k + seq)
    least = tl.full((), -0x80000000, tl.int32)
    if (count > 0) & (count < width):
        spare = (width - count).to(tl.float32)
        least = _edge(row, width, bottom, top.to(tl.int64), spare, peak, least, True, BLOCK).to(tl.int32)
    kept_mass = tl.load(p + seq)
    limit = 0.0
    edge = least
    below = 0.0
    equals = 0
    if kept_mass < 1.0:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            x = tl.load(row + start + columns, mask=start + columns < width, other=float("-inf"))
            total += tl.where(_key(x) >= least, tl.exp2((x - peak) * LOG2_E), 0.0)
        limit = (1.0 - kept_mass) * tl.sum(total, axis=0)
        edge = _edge(row, width, least.to(tl.int64), top.to(tl.int64), limit, peak, least, False, BLOCK).to(tl.int32)
        mass = tl.zeros((BLOCK,), tl.float32)
        ties = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, width, BLOCK):
            x = tl.load(row + start + columns, mask=start + columns < width, other=float("-inf"))
            key = _key(x)
            mass += tl.where((key >= least) & (key < edge), tl.exp2((x - peak) * LOG2_E), 0.0)
            ties += ((key == edge) & (start + columns < width)).to(tl.int32)
        below = tl.sum(mass, axis=0)
        equals = tl.sum(ties, axis=0)

    best = tl.full((BLOCK,), -1.0, tl.float32)
    best_at = tl.zeros((BLOCK,), tl.int32)
    seen = 0
    for start in range(0, width, BLOCK):
        is_token = start + columns < width
        x = tl.load(row + start + columns, mask=is_token, other=float("-inf"))
        key = _key(x)
        worth = tl.exp2((x - peak) * LOG2_E)
        is_kept = key >= edge
        if kept_mass < 1.0:
            is_equal = ((key == edge) & is_token).to(tl.int32)
            order = seen + tl.cumsum(is_equal, axis=0)
            seen += tl.sum(is_equal, axis=0)
            is_kept = is_kept & ((key > edge) | (order == equals) | (below + order * worth > limit))
        if DRAW:
            rate = tl.load(noise + seq * width + start + columns, mask=is_token, other=1.0)
            ratio = tl.where(is_kept & is_token, tl.div_rn(worth, rate), -1.0)
            best_at = tl.where(ratio > best, start + columns, best_at)
            best = tl.maximum(best, ratio)
        else:
            tl.store(out + seq * width + start + columns, tl.where(is_kept, x, float("-inf")), mask=is_token)
    if DRAW:
        _, token = first_max(best, best_at, 0)
        tl.store(out + seq, tl.max(token, axis=0).to(tl.int64))


@triton.jit
def _verify(
    draft, draft_probs, target_probs, uniform, noise, tokens, accepted, width,
    DRAFTS: tl.constexpr, DRAWN: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PLACES)
    is_place = place < DRAFTS
    token = tl.load(draft + seq * DRAFTS + place, mask=is_place, other=-1)
    is_draft = token >= 0
    wanted = tl.load(target_probs + (seq * (DRAFTS + 1) + place) * width + token, mask=is_draft, other=0.0)
    offered = tl.load(uniform + seq * DRAFTS + place, mask=is_place, other=0.0)
    if DRAWN:
        offered *= tl.load(draft_probs + (seq * DRAFTS + place) * width + token, mask=is_draft, other=0.0)
    count = tl.min(tl.where(is_draft & (offered < wanted), PLACES, place), axis=0)
    is_refused = count < tl.min(tl.where(is_draft, PLACES, place), axis=0)
    refused = tl.max(tl.where(place == count, token, -1), axis=0)

    columns = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), -1.0, tl.float32)
    best_at = tl.zeros((BLOCK,), tl.int32)
    best_above = tl.zeros((BLOCK,), tl.float32)
    best_above_at = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        column = start + columns
        is_token = column < width
        target = tl.load(target_probs + (seq * (DRAFTS + 1) + count) * width + column, mask=is_token, other=0.0)
        rate = tl.load(noise + seq * width + column, mask=is_token, other=1.0)
        ratio = tl.where(is_token, tl.div_rn(target, rate), -1.0)
        best_at = tl.where(ratio > best, column, best_at)
        best = tl.maximum(best, ratio)
        if DRAWN:
            drawn = draft_probs + (seq * DRAFTS + count) * width + column
            mine = tl.load(drawn, mask=column < tl.where(is_refused, width, 0), other=0.0)
            above = tl.maximum(target - mine, 0.0)
        else:
            above = tl.where(column == refused, 0.0, target)
        ratio = tl.div_rn(above, rate)
        best_above_at = tl.where(ratio > best_above, column, best_above_at)
        best_above = tl.maximum(best_above, ratio)
    _, last = first_max(best, best_at, 0)
    above, last_above = first_max(best_above, best_above_at, 0)
    last = tl.where(is_refused & (above > 0.0), last_above, last)
    last = tl.max(last, axis=0).to(tl.int64)
    out = tl.where(place < count, token, tl.where(place == count, last, -1))
    tl.store(tokens + seq * (DRAFTS + 1) + place, out, mask=place <= DRAFTS)
    tl.store(accepted + seq, count)


def top_k_top_p(logits: Tensor, k: Tensor, p: Tensor) -> Tensor:
    out = torch.empty_like(logits)
    _launch(logits, k, p, logits, out, draw=False)
    return out


def sample(logits: Tensor, k: Tensor, p: Tensor, noise: Tensor) -> Tensor:
    out = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    _launch(logits, k, p, noise, out, draw=True)
    return out


def _launch(logits: Tensor, k: Tensor, p: Tensor, noise: Tensor, out: Tensor, draw: bool) -> None:
    sequences, width = logits.shape
    if sequences:
        block = min(power_of_two(width), _BLOCK)
        _choose[(sequences,)](logits, k, p, noise, out, width, DRAW=draw, BLOCK=block, num_warps=8)


def speculative_verify(
    draft: Tensor, draft_probs: Tensor | None, target_probs: Tensor, uniform: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    sequences, drafts = draft.shape
    width = target_probs.shape[2]
    tokens = torch.empty(sequences, drafts + 1, dtype=torch.int64, device=draft.device)
    accepted = torch.empty(sequences, dtype=torch.int32, device=draft.device)
    if sequences:
        _verify[(sequences,)](
            draft, target_probs if draft_probs is None else draft_probs, target_probs, uniform, noise, tokens,
            accepted, width,
            DRAFTS=drafts, DRAWN=draft_probs is not None, PLACES=power_of_two(drafts + 1),
            BLOCK=min(power_of_two(width), _BLOCK), num_warps=8,
        )  # fmt: skip
    return tokens, accepted


KERNELS: Mapping[str, Callable[..., Any]] = {
    "top_k_top_p": top_k_top_p,
    "sample": sample,
    "speculative_verify": speculative_verify,
}
