"""Copies onto ranks from nothing: longest processing time first."""

# mypy: disable-error-code="no-any-return"

import numpy as np

from omni_common.compiled import kernel
from omni_placement.layout import EMPTY, Numbers, Slots
from omni_placement.problem import Loads


@kernel
def pack(load: Loads, copies: Numbers, capacity: Numbers, held: Slots) -> float:
    """Fill `held` (ranks, slots) of one layer, which may hold experts from the start of each rank's slots.

    Shares go in falling order, each to the least loaded rank that has room and does not hold the expert. A further copy
    for which there is no such rank is left out. The first of each expert always finds one: `capacity` is enough.
    Answers the slowest rank's load, as if none were left out.
    """
    ranks, experts = len(capacity), len(load)
    used, rank_load = np.zeros(ranks, dtype=np.int64), np.zeros(ranks)
    missing = copies.copy()
    for rank in range(ranks):
        while used[rank] < held.shape[1] and held[rank, used[rank]] != EMPTY:
            expert = held[rank, used[rank]]
            rank_load[rank] += load[expert] / copies[expert]
            missing[expert] -= 1
            used[rank] += 1
    unplaced = 0
    for expert in range(experts):
        unplaced += missing[expert] == copies[expert]
    spare = capacity.sum() - used.sum() - unplaced
    open_ranks, size = np.empty(ranks, dtype=np.int64), 0
    for rank in range(ranks):
        if used[rank] < capacity[rank]:
            size = _push(open_ranks, size, rank, rank_load, used)
    aside = np.empty(ranks, dtype=np.int64)
    for expert in np.argsort(-load / copies):
        is_first = missing[expert] == copies[expert]
        left = min(missing[expert], spare + is_first)
        spare -= left - is_first
        num_aside = 0
        while left > 0 and size > 0:
            rank = open_ranks[0]
            size = _pop(open_ranks, size, rank_load, used)
            if is_first or not (held[rank, : used[rank]] == expert).any():
                held[rank, used[rank]] = expert
                used[rank] += 1
                rank_load[rank] += load[expert] / copies[expert]
                left -= 1
            if used[rank] < capacity[rank]:
                aside[num_aside] = rank
                num_aside += 1
        for index in range(num_aside):
            size = _push(open_ranks, size, aside[index], rank_load, used)
    return rank_load.max()


@kernel
def _is_before(first: int, second: int, rank_load: Loads, used: Numbers) -> bool:
    if rank_load[first] != rank_load[second]:
        return rank_load[first] < rank_load[second]
    return used[first] < used[second] or (used[first] == used[second] and first < second)


@kernel
def _push(heap: Numbers, size: int, rank: int, rank_load: Loads, used: Numbers) -> int:
    """Into a binary heap, the least loaded rank first. Answers its size."""
    place = size
    while place > 0 and _is_before(rank, heap[(place - 1) // 2], rank_load, used):
        heap[place] = heap[(place - 1) // 2]
        place = (place - 1) // 2
    heap[place] = rank
    return size + 1


@kernel
def _pop(heap: Numbers, size: int, rank_load: Loads, used: Numbers) -> int:
    """Take out the first. Answers the heap's size."""
    size -= 1
    rank, place = heap[size], 0
    while 2 * place + 1 < size:
        child = 2 * place + 1
        if child + 1 < size and _is_before(heap[child + 1], heap[child], rank_load, used):
            child += 1
        if not _is_before(heap[child], rank, rank_load, used):
            break
        heap[place] = heap[child]
        place = child
    heap[place] = rank
    return size
