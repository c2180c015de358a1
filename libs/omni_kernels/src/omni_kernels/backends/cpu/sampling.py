"""Choice of the next token without sorting the vocabulary: a heap gives up its likely tokens, one after another."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from omni_kernels.backends.cpu.compiled import compiled, pointer
from omni_kernels.backends.cpu.rows import FLOAT, WORD, exponential, part

_LONG = np.int64


@part
def _sink(values: Any, places: Any, at: int, size: int) -> None:
    """Restore the heap (larger value first, of equal ones the higher place) below `at`."""
    value, place = values[at], places[at]
    while 2 * at + 1 < size:
        child = 2 * at + 1
        right = child + 1
        if right < size and (
            values[right] > values[child] or (values[right] == values[child] and places[right] > places[child])
        ):
            child = right
        if values[child] < value or (values[child] == value and places[child] < place):
            break
        values[at], places[at] = values[child], places[child]
        at = child
    values[at], places[at] = value, place


@part
def _keep(row: Any, k: int, p: float, values: Any, places: Any) -> int:
    """Leave the places of the tokens that top-k and top-p keep at the end of `places`, and return how many they are."""
    size = len(row)
    for i in range(size):
        values[i], places[i] = row[i], i
    if not 0 < k < size:
        k = size
    if k == size and p >= 1:
        return size
    for at in range(size // 2 - 1, -1, -1):
        _sink(values, places, at, size)
    top = values[0]

    # The next token goes from the top of the heap to behind its end.
    kept, edge = 0, values[0]
    total = 0.0
    if k == size:
        for i in range(size):
            total += exponential(values[i] - top)
    mass = 0.0
    while kept < size and (kept < k or values[0] == edge):
        if k == size and kept and mass >= p * total:
            break
        value, place = values[0], places[0]
        kept += 1
        values[0], places[0] = values[size - kept], places[size - kept]
        values[size - kept], places[size - kept] = value, place
        _sink(values, places, 0, size - kept)
        edge = value
        mass += exponential(value - top)
    if k == size or p >= 1:
        return kept
    total, mass, among = mass, 0.0, kept
    kept = 0
    while kept < among and (kept == 0 or mass < p * total):
        kept += 1
        mass += exponential(values[size - kept] - top)
    return kept


@compiled
def _choose(
    logits_at: int, k_at: int, p_at: int, noise_at: int, kept_at: int, tokens_at: int, rows: int, vocabulary: int
) -> None:
    """Fill `kept`, or where its address is 0 `tokens`."""
    k, p = carray(pointer(k_at, WORD), (rows,)), carray(pointer(p_at, FLOAT), (rows,))
    values, places = np.empty(vocabulary, FLOAT), np.empty(vocabulary, WORD)
    for r in range(rows):
        offset = 4 * r * vocabulary
        row = carray(pointer(logits_at + offset, FLOAT), (vocabulary,))
        count = _keep(row, k[r], p[r], values, places)
        if kept_at:
            kept = carray(pointer(kept_at + offset, FLOAT), (vocabulary,))
            for i in range(vocabulary):
                kept[i] = -np.inf
            for i in range(vocabulary - count, vocabulary):
                kept[places[i]] = values[i]
        else:
            noise = carray(pointer(noise_at + offset, FLOAT), (vocabulary,))
            top = FLOAT(-np.inf)
            for i in range(vocabulary - count, vocabulary):
                top = max(top, values[i])
            best, token = FLOAT(-1), WORD(0)
            for i in range(vocabulary - count, vocabulary):
                ratio = exponential(values[i] - top) / noise[places[i]]
                if ratio > best or (ratio == best and places[i] < token):
                    best, token = ratio, places[i]
            carray(pointer(tokens_at, _LONG), (rows,))[r] = token


def _top_k_top_p(logits: Tensor, k: Tensor, p: Tensor) -> Tensor:
    kept = torch.empty_like(logits)
    _choose(logits.data_ptr(), k.data_ptr(), p.data_ptr(), 0, kept.data_ptr(), 0, *logits.shape)
    return kept


def _sample(logits: Tensor, k: Tensor, p: Tensor, noise: Tensor) -> Tensor:
    tokens = k.new_empty(k.shape, dtype=torch.int64)
    _choose(logits.data_ptr(), k.data_ptr(), p.data_ptr(), noise.data_ptr(), 0, tokens.data_ptr(), *logits.shape)
    return tokens


KERNELS: Mapping[str, Callable[..., Any]] = {"top_k_top_p": _top_k_top_p, "sample": _sample}
