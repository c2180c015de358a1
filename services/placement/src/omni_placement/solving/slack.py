"""Swaps that the slowest rank does not notice, for the sake of where experts lie."""

# mypy: disable-error-code="assignment,arg-type"

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from omni_common.compiled import kernel
from omni_placement.layout import EMPTY, Numbers, Slots
from omni_placement.problem import Loads

_ROUNDS = 8


class _Ranks(NamedTuple):
    held: Slots
    rank_load: Loads
    share: Loads
    """(experts + 1,): load of a copy, and of an empty slot."""
    holds: npt.NDArray[np.bool_]
    """(ranks, experts)"""


@kernel
def bring_home(
    held: Slots, load: Loads, capacity: Numbers, pinned: npt.NDArray[np.bool_], away: Loads, height: float
) -> None:
    """Swap experts between ranks, or move them to slots that are free, in place, while that lowers the sum of `away`
    over what ranks hold and leaves no rank above `height`. `away` (ranks, experts) is what it costs to be there.
    """
    ranks = _ranks(held, load)
    for _ in range(_ROUNDS):
        is_changed = False
        for rank in range(len(held)):
            for slot in range(held.shape[1]):
                expert = held[rank, slot]
                if expert != EMPTY and not pinned[rank, expert] and away[rank, expert] > 0.0:
                    other_rank, other_slot = _best_place(ranks, capacity, pinned, away, height, rank, expert)
                    if other_rank >= 0:
                        _swap(ranks, rank, slot, other_rank, other_slot)
                        is_changed = True
        if not is_changed:
            break


@kernel
def _ranks(held: Slots, load: Loads) -> _Ranks:
    copies = np.zeros(len(load), dtype=np.int64)
    for expert in held.ravel():
        if expert != EMPTY:
            copies[expert] += 1
    share = np.append(load / copies, 0.0)
    ranks = _Ranks(held, np.zeros(len(held)), share, np.zeros((len(held), len(load)), dtype=np.bool_))
    for rank in range(len(held)):
        for expert in held[rank]:
            ranks.rank_load[rank] += share[expert]
            if expert != EMPTY:
                ranks.holds[rank, expert] = True
    return ranks


@kernel
def _best_place(
    ranks: _Ranks,
    capacity: Numbers,
    pinned: npt.NDArray[np.bool_],
    away: Loads,
    height: float,
    rank: int,
    expert: int,
) -> tuple[int, int]:
    """Rank and slot to change places with; -1 where none is better."""
    best_gain, best_rank, best_slot = 0.0, -1, -1
    for other_rank in range(len(capacity)):
        gain = away[rank, expert] - away[other_rank, expert]
        if gain <= 0.0 or ranks.holds[other_rank, expert]:
            continue
        for other_slot in range(capacity[other_rank]):
            other, change = ranks.held[other_rank, other_slot], gain
            if other != EMPTY:
                if pinned[other_rank, other] or ranks.holds[rank, other]:
                    continue
                change += away[other_rank, other] - away[rank, other]
            more = ranks.share[expert] - ranks.share[other]
            fits = ranks.rank_load[other_rank] + more <= height and ranks.rank_load[rank] - more <= height
            if fits and change > best_gain:
                best_gain, best_rank, best_slot = change, other_rank, other_slot
    return best_rank, best_slot


@kernel
def _swap(ranks: _Ranks, rank: int, slot: int, other_rank: int, other_slot: int) -> None:
    expert, other = ranks.held[rank, slot], ranks.held[other_rank, other_slot]
    more = ranks.share[expert] - ranks.share[other]
    ranks.rank_load[other_rank] += more
    ranks.rank_load[rank] -= more
    ranks.held[rank, slot], ranks.held[other_rank, other_slot] = other, expert
    ranks.holds[rank, expert], ranks.holds[other_rank, expert] = False, True
    if other != EMPTY:
        ranks.holds[rank, other], ranks.holds[other_rank, other] = True, False
