"""Routing as one compiled loop over tokens; the scores of all experts, where a bias needs them, through torch."""

from collections.abc import Callable, Mapping
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from omni_kernels.backends.cpu.compiled import compiled, pointer
from omni_kernels.checks import refuse
from omni_kernels.ops.moe_gate import EPS, GOLDEN

_FLOAT, _INT, _LONG = np.float32, np.int32, np.int64
_BLOCK = 16
"""Experts compared at a time with the worst one chosen so far; few blocks hold a better one."""


@compiled
def _insert(best: Any, who: Any, value: Any, expert: int) -> None:
    """Put `expert` where its `value` belongs in `best`, which falls; behind its equals."""
    at = len(best) - 1
    while at > 0 and best[at - 1] < value:
        best[at] = best[at - 1]
        who[at] = who[at - 1]
        at -= 1
    best[at] = value
    who[at] = expert


@compiled
def _best_of(row: Any, first: int, last: int, best: Any, who: Any) -> None:
    """Enter row[first:last] into the best values so far."""
    worst = len(best) - 1
    for start in range(first, last, _BLOCK):
        stop = min(start + _BLOCK, last)
        better = 0
        for expert in range(start, stop):
            better += row[expert] > best[worst]
        if better:
            for expert in range(start, stop):
                if row[expert] > best[worst]:
                    _insert(best, who, row[expert], expert)


@compiled
def _best_in_groups(row: Any, is_pair: bool, size: int, kept: Any, worth: Any, best: Any, who: Any) -> None:
    """As `_best_of`, of the experts in the best len(kept) groups of `size` experts each."""
    worth[:] = -np.inf
    kept[:] = 0  # stays where a row is NaN
    for group in range(len(row) // size):
        first = second = _FLOAT(-np.inf)
        for expert in range(group * size, (group + 1) * size):
            value = row[expert]
            second = max(second, min(first, value))
            first = max(first, value)
        value = first + second if is_pair else first
        if value > worth[-1]:
            _insert(worth, kept, value, group)
    kept.sort()  # equals go to the lower expert, so they are looked at in order
    for group in kept:
        _best_of(row, group * size, (group + 1) * size, best, who)


@compiled
def _weigh(logits: Any, is_softmax: bool, renormalize: bool, denominator: float, scale: float, weights: Any) -> None:
    """Weights of the experts whose `logits` these are; `denominator`: of a softmax over all, in logarithm."""
    top = np.max(logits) if renormalize else _FLOAT(denominator)
    total = _FLOAT(0)
    for j in range(len(logits)):
        weights[j] = np.exp(logits[j] - top) if is_softmax else _FLOAT(1) / (_FLOAT(1) + np.exp(-logits[j]))
        total += weights[j]
    factor = _FLOAT(scale) / (total + _FLOAT(EPS)) if renormalize else _FLOAT(scale)
    for j in range(len(logits)):
        weights[j] *= factor


@compiled
def _choose(
    addresses: tuple[int, int, int, int, int],
    shape: tuple[int, int, int, int, int],
    is_softmax: bool,
    is_pair: bool,
    renormalize: bool,
    scale: float,
) -> None:
    """Fill the last two of `addresses`: logits, choice, denominators, weights, experts. `shape`: T, E, k and groups."""
    tokens, num_experts, top_k, groups, kept_groups = shape
    logits = numba.carray(pointer(addresses[0], _FLOAT), (tokens, num_experts))
    choice = numba.carray(pointer(addresses[1], _FLOAT), (tokens, num_experts))
    denominators = numba.carray(pointer(addresses[2], _FLOAT), (tokens,))
    weights = numba.carray(pointer(addresses[3], _FLOAT), (tokens, top_k))
    experts = numba.carray(pointer(addresses[4], _INT), (tokens, top_k))
    best = np.empty(top_k, _FLOAT)
    kept = np.empty(kept_groups, _INT)
    worth = np.empty(kept_groups, _FLOAT)
    for token in range(tokens):
        who = experts[token]
        best[:] = -np.inf
        who[:] = 0
        if groups > 1:
            _best_in_groups(choice[token], is_pair, num_experts // groups, kept, worth, best, who)
        else:
            _best_of(choice[token], 0, num_experts, best, who)
        for j in range(top_k):
            best[j] = logits[token, who[j]]
        _weigh(best, is_softmax, renormalize, denominators[token], scale, weights[token])


@compiled
def _place(
    addresses: tuple[int, int, int, int],
    shape: tuple[int, int, int],
    strides: tuple[int, int],
    num_slots: int,
    token_offset: int,
    counted: int,
) -> bool:
    """Fill slots and counts. `addresses`: experts, replicas or 0, slots, counts; `shape`: T, k, E.

    `strides` are int32s to a row of replicas, and to an entry. False where an expert has no slot, or one out of range.
    """
    tokens, top_k, num_experts = shape
    stride, step = strides
    experts = numba.carray(pointer(addresses[0], _INT), (tokens, top_k))
    replicas = numba.carray(pointer(addresses[1], _INT), (num_experts * stride,))
    slots = numba.carray(pointer(addresses[2], _INT), (tokens, top_k))
    counts = numba.carray(pointer(addresses[3], _LONG), (num_slots,))
    counts[:] = 0
    for token in range(tokens):
        for j in range(top_k):
            slot = expert = np.int64(experts[token, j])
            if addresses[1] != 0:
                first, copies = expert * stride, 0
                while copies * step < stride and replicas[first + copies * step] >= 0:
                    copies += 1
                fraction = ((token + token_offset + expert) * GOLDEN) & 0xFFFFFFFF
                slot = np.int64(replicas[first + ((fraction * copies) >> 32) * step])
            if slot < 0 or slot >= num_slots:
                return False
            slots[token, j] = slot
            if token < counted:
                counts[slot] += 1
    return True


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
    tokens, num_experts = logits.shape
    logits = logits.float().contiguous()
    is_softmax = scoring == "softmax"
    choice = denominators = logits
    if bias is not None:
        choice = (logits.softmax(-1) if is_softmax else logits.sigmoid()).add_(bias)
    if is_softmax and not renormalize:
        denominators = logits.logsumexp(-1)
    weights = torch.empty((tokens, top_k), dtype=torch.float32)
    experts = torch.empty((tokens, top_k), dtype=torch.int32)
    slots = torch.empty_like(experts)
    counts = torch.empty(num_slots, dtype=torch.int64)
    _choose(
        (logits.data_ptr(), choice.data_ptr(), denominators.data_ptr(), weights.data_ptr(), experts.data_ptr()),
        (tokens, num_experts, top_k, num_groups, top_k_groups),
        is_softmax,
        bias is not None,
        renormalize,
        float(scale),
    )
    table_at, strides = 0, (0, 1)
    if replicas is not None:
        replicas = replicas.contiguous()
        step = replicas.itemsize // 4  # the low half of an int64 stands first
        table_at, strides = replicas.data_ptr(), (replicas.shape[1] * step, step)
    is_done = _place(
        (experts.data_ptr(), table_at, slots.data_ptr(), counts.data_ptr()),
        (tokens, top_k, num_experts),
        strides,
        num_slots,
        token_offset,
        tokens if real_tokens is None else int(real_tokens),
    )
    if not is_done:
        refuse("replicas", f"every chosen expert needs slots from 0 to {num_slots - 1}", "-1 or one beyond")
    return weights, experts, slots, counts


KERNELS: Mapping[str, Callable[..., Any]] = {"moe_gate": _moe_gate}
