"""Tokens to their experts' rows and back: a counting sort, and a weighted sum that reads every row once."""

from collections.abc import Callable, Mapping
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from omni_kernels.backends.cpu.compiled import compiled, pointer
from omni_kernels.checks import refuse
from omni_kernels.ops.moe_permute import MOE_COMBINE

_FLOAT, _INT, _LONG, _WORD, _HALF = np.float32, np.int32, np.int64, np.uint32, np.uint16


@compiled
def _sort(slots_at: int, pairs: int, top_k: int, num_slots: int, source_at: int, tokens_at: int, sizes_at: int) -> int:
    """Fill source (pairs,), the token of each (pairs,) and sizes (num_slots,); returns the number of local rows."""
    slots = numba.carray(pointer(slots_at, _INT), (pairs,))
    source = numba.carray(pointer(source_at, _INT), (pairs,))
    tokens = numba.carray(pointer(tokens_at, _INT), (pairs,))
    sizes = numba.carray(pointer(sizes_at, _LONG), (num_slots,))
    sizes[:] = 0
    for pair in range(pairs):
        if 0 <= slots[pair] < num_slots:
            sizes[slots[pair]] += 1
    place = np.empty(num_slots, _LONG)
    local = 0
    for slot in range(num_slots):
        place[slot] = local
        local += sizes[slot]
    behind = local
    for pair in range(pairs):
        slot = slots[pair]
        if 0 <= slot < num_slots:
            row = place[slot]
            place[slot] += 1
        else:
            row = behind
            behind += 1
        source[row] = pair
        tokens[row] = pair // top_k
    return local


def permute(x: Tensor, slots: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    slots = slots.contiguous()
    pairs = slots.numel()
    source = torch.empty(pairs, dtype=torch.int32)
    tokens = torch.empty(pairs, dtype=torch.int32)
    sizes = torch.empty(num_slots, dtype=torch.int64)
    addresses = (source.data_ptr(), tokens.data_ptr(), sizes.data_ptr())
    local = _sort(slots.data_ptr(), pairs, slots.shape[1], num_slots, *addresses)
    rows = x.index_select(0, tokens)
    if local < pairs:
        rows[local:] = 0
    return rows, source, sizes


@compiled
def _widen(half: Any, out: Any) -> None:
    """bfloat16 as it is stored to the bits of float32."""
    for i in range(len(half)):
        out[i] = _WORD(half[i]) << _WORD(16)


@compiled
def _narrow(word: Any, out: Any) -> None:
    """Bits of float32 to bfloat16 as it is stored, rounding half to even; NaN stays NaN."""
    for i in range(len(word)):
        bits = word[i]
        rounded = (bits + _WORD(0x7FFF) + ((bits >> _WORD(16)) & _WORD(1))) >> _WORD(16)
        out[i] = _HALF(rounded) if (bits & _WORD(0x7FFFFFFF)) <= _WORD(0x7F800000) else _HALF(0x7FC0)


@compiled
def _places(source: Any) -> tuple[Any, bool]:
    """The row of each pair, and whether all pairs are in range."""
    place = np.zeros(len(source), _INT)
    for row in range(len(source)):
        if not 0 <= source[row] < len(source):
            return place, False
        place[source[row]] = row
    return place, True


@compiled
def _combine_wide(
    rows_at: int, source_at: int, weights_at: int, residual_at: int, out_at: int, tokens: int, top_k: int, hidden: int
) -> bool:
    """float32; no residual where its address is 0. False where `source` is out of range."""
    rows = numba.carray(pointer(rows_at, _FLOAT), (tokens * top_k, hidden))
    place, is_right = _places(numba.carray(pointer(source_at, _INT), (tokens * top_k,)))
    if not is_right:
        return False
    weights = numba.carray(pointer(weights_at, _FLOAT), (tokens, top_k))
    residual = numba.carray(pointer(residual_at, _FLOAT), (tokens, hidden))
    out = numba.carray(pointer(out_at, _FLOAT), (tokens, hidden))
    for token in range(tokens):
        total = out[token]
        total[:] = 0
        for choice in range(top_k):
            row = rows[place[token * top_k + choice]]
            weight = weights[token, choice]
            for i in range(hidden):
                total[i] += weight * row[i]
        if residual_at != 0:
            for i in range(hidden):
                total[i] += residual[token, i]
    return True


@compiled
def _combine_half(
    rows_at: int, source_at: int, weights_at: int, residual_at: int, out_at: int, tokens: int, top_k: int, hidden: int
) -> bool:
    """bfloat16; no residual where its address is 0. False where `source` is out of range."""
    rows = numba.carray(pointer(rows_at, _HALF), (tokens * top_k, hidden))
    place, is_right = _places(numba.carray(pointer(source_at, _INT), (tokens * top_k,)))
    if not is_right:
        return False
    weights = numba.carray(pointer(weights_at, _FLOAT), (tokens, top_k))
    residual = numba.carray(pointer(residual_at, _HALF), (tokens, hidden))
    out = numba.carray(pointer(out_at, _HALF), (tokens, hidden))
    total = np.empty(hidden, _FLOAT)
    word = np.empty(hidden, _WORD)
    value = word.view(_FLOAT)
    for token in range(tokens):
        total[:] = 0
        for choice in range(top_k):
            _widen(rows[place[token * top_k + choice]], word)
            weight = weights[token, choice]
            for i in range(hidden):
                total[i] += weight * value[i]
        if residual_at != 0:
            _widen(residual[token], word)
            for i in range(hidden):
                total[i] += value[i]
        _narrow(total.view(_WORD), out[token])
    return True


def combine(rows: Tensor, source: Tensor, weights: Tensor, residual: Tensor | None) -> Tensor:
    """float16, which numba has not, runs as the meaning."""
    if rows.dtype is torch.float16:
        return MOE_COMBINE.meaning(rows, source, weights, residual)
    tokens, top_k = weights.shape
    out = torch.empty((tokens, rows.shape[1]), dtype=rows.dtype)
    run = _combine_wide if rows.dtype is torch.float32 else _combine_half
    added = 0 if residual is None else residual.data_ptr()
    weights = weights.contiguous()
    addresses = (rows.data_ptr(), source.data_ptr(), weights.data_ptr(), added, out.data_ptr())
    if not run(*addresses, tokens, top_k, rows.shape[1]):
        refuse("source", f"must be a permutation of 0 .. {len(rows) - 1}", "one beyond")
    return out


KERNELS: Mapping[str, Callable[..., Any]] = {"moe_permute": permute, "moe_combine": combine}
