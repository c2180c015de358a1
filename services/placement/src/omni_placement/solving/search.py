"""Local search in one layer: the slowest rank gives something away until nothing helps.

One step changes the slowest rank by the best of five:

    move     one of its experts to a rank with room
    swap     one of its experts for a lighter one of another rank
    drop     a copy that others hold too
    add      a copy of one of its experts on a rank with room, which lightens every holder
    replace  the same, in the slot of a copy that others hold too

Best is what leaves the ranks concerned with the smallest maximum, per weights moved where that matters. The maximum
must lie below the present one: so each step leaves fewer ranks there, and the search ends.
"""

# mypy: disable-error-code="assignment,arg-type,no-any-return"
# Scalars are annotated `int` and `float`; to mypy, what comes out of an array is something else.

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from omni_common.compiled import kernel
from omni_placement.layout import EMPTY, Numbers, Slots
from omni_placement.problem import Loads

NOTHING, MOVE, SWAP, DROP, ADD, REPLACE = range(6)
_LEAST = 1e-9
"""A step must be worth more than rounding, relative to the maximum."""


class Ranks(NamedTuple):
    """One layer under search. Experts of a rank fill its slots from the first."""

    held: Slots
    """(ranks, slots)"""
    used: Numbers
    rank_load: Loads
    copies: Numbers
    share: Loads
    """(experts,): load / copies."""
    holders: Numbers
    """(experts, ranks): the first `copies` are the ranks that hold the expert."""
    holds: npt.NDArray[np.bool_]
    """(ranks, experts)"""


class Goal(NamedTuple):
    """What the search is for, and what it must not do."""

    capacity: Numbers
    pinned: npt.NDArray[np.bool_]
    """(ranks, experts)"""
    strange: npt.NDArray[np.bool_]
    """(ranks, experts): not there in the layout in force, so weights have to move; nowhere if that is no matter."""
    limit: int
    """Copies of an expert."""
    target: float
    """Load at which a rank is light enough."""
    floor: float
    """Load below which it is worth nothing to be."""


class Step(NamedTuple):
    """What to do with `slot` of the slowest rank, and `other_slot` of `rank`; `worth` is the fall of the maximum over
    the weights moved."""

    kind: int
    slot: int
    rank: int
    other_slot: int
    worth: float


@kernel
def _ranks(held: Slots, load: Loads) -> Ranks:
    num_ranks, num_experts = len(held), len(load)
    ranks = Ranks(
        held,
        np.zeros(num_ranks, dtype=np.int64),
        np.zeros(num_ranks),
        np.zeros(num_experts, dtype=np.int64),
        np.zeros(num_experts),
        np.empty((num_experts, num_ranks), dtype=np.int64),
        np.zeros((num_ranks, num_experts), dtype=np.bool_),
    )
    for rank in range(num_ranks):
        while ranks.used[rank] < held.shape[1] and held[rank, ranks.used[rank]] != EMPTY:
            expert = held[rank, ranks.used[rank]]
            ranks.holders[expert, ranks.copies[expert]] = rank
            ranks.copies[expert] += 1
            ranks.holds[rank, expert] = True
            ranks.used[rank] += 1
    for expert in range(num_experts):
        ranks.share[expert] = load[expert] / ranks.copies[expert]
        for index in range(ranks.copies[expert]):
            ranks.rank_load[ranks.holders[expert, index]] += ranks.share[expert]
    return ranks


@kernel
def _put(ranks: Ranks, load: Loads, expert: int, rank: int) -> None:
    ranks.held[rank, ranks.used[rank]] = expert
    ranks.used[rank] += 1
    ranks.holds[rank, expert] = True
    ranks.holders[expert, ranks.copies[expert]] = rank
    _recount(ranks, load, expert, 1)
    ranks.rank_load[rank] += ranks.share[expert]


@kernel
def _take(ranks: Ranks, load: Loads, rank: int, slot: int) -> int:
    expert = ranks.held[rank, slot]
    ranks.used[rank] -= 1
    ranks.held[rank, slot] = ranks.held[rank, ranks.used[rank]]
    ranks.held[rank, ranks.used[rank]] = EMPTY
    ranks.holds[rank, expert] = False
    holders = ranks.holders[expert]
    index = 0
    while holders[index] != rank:
        index += 1
    holders[index] = holders[ranks.copies[expert] - 1]
    holders[ranks.copies[expert] - 1] = rank
    ranks.rank_load[rank] -= ranks.share[expert]
    if ranks.copies[expert] > 1:
        _recount(ranks, load, expert, -1)
    else:
        ranks.copies[expert] = 0
        ranks.share[expert] = 0.0
    return expert


@kernel
def _recount(ranks: Ranks, load: Loads, expert: int, change: int) -> None:
    """One copy more, or less. The ranks that hold one before and after see the share change."""
    before = ranks.copies[expert]
    share = load[expert] / (before + change)
    for index in range(min(before, before + change)):
        ranks.rank_load[ranks.holders[expert, index]] += share - ranks.share[expert]
    ranks.copies[expert] = before + change
    ranks.share[expert] = share


@kernel
def _worth(fall: float, moves: int) -> float:
    return fall / (0.5 + max(moves, 0))


@kernel
def _best_exchange(ranks: Ranks, goal: Goal, slow: int, best: Step) -> Step:
    """Moves and swaps. A rank cannot leave less than half of the sum: after the lightest, that spares most others."""
    top, strange = ranks.rank_load[slow], goal.strange
    lightest = np.argmin(ranks.rank_load)
    for offset in range(len(goal.capacity)):
        rank = (lightest + offset) % len(goal.capacity)
        room = top - ranks.rank_load[rank]
        if _worth(top - max(top - room / 2, goal.floor), 0) <= best.worth or goal.capacity[rank] == 0:
            continue
        for slot in range(ranks.used[slow]):
            expert = ranks.held[slow, slot]
            if ranks.holds[rank, expert] or goal.pinned[slow, expert]:
                continue
            share = ranks.share[expert]
            moves = int(strange[rank, expert]) - int(strange[slow, expert])
            if ranks.used[rank] < goal.capacity[rank]:
                height = max(top - share, top - room + share)
                worth = _worth(top - max(height, goal.floor), moves)
                if worth > best.worth:
                    best = Step(MOVE, slot, rank, 0, worth)
            for other_slot in range(ranks.used[rank]):
                other = ranks.held[rank, other_slot]
                less = share - ranks.share[other]
                fall = top - max(top - less, top - room + less, goal.floor)
                if 2 * fall <= best.worth or ranks.holds[slow, other] or goal.pinned[rank, other]:
                    continue
                worth = _worth(fall, moves + int(strange[slow, other]) - int(strange[rank, other]))
                if worth > best.worth:
                    best = Step(SWAP, slot, rank, other_slot, worth)
    return best


@kernel
def _height_without(ranks: Ranks, load: Loads, expert: int, rank: int, lighter: int, less: float) -> float:
    """Highest load on other holders of `expert` when `rank` no longer holds it; holders of `lighter` lose `less`."""
    more = load[expert] / (ranks.copies[expert] - 1) - ranks.share[expert]
    height = 0.0
    for index in range(ranks.copies[expert]):
        holder = ranks.holders[expert, index]
        if holder != rank:
            height = max(height, ranks.rank_load[holder] + more - (less if ranks.holds[holder, lighter] else 0.0))
    return height


@kernel
def _best_recount(ranks: Ranks, load: Loads, goal: Goal, spare: int, slow: int, best: Step) -> Step:
    """Drops, additions and replacements."""
    top, strange = ranks.rank_load[slow], goal.strange
    replicated = np.flatnonzero(ranks.copies > 1)
    for slot in range(ranks.used[slow]):
        expert = ranks.held[slow, slot]
        copies = ranks.copies[expert]
        if copies > 1 and not goal.pinned[slow, expert]:
            height = max(top - ranks.share[expert], _height_without(ranks, load, expert, slow, expert, 0.0))
            worth = _worth(top - max(height, goal.floor), -int(strange[slow, expert]))
            if worth > best.worth:
                best = Step(DROP, slot, slow, 0, worth)
        share = load[expert] / (copies + 1)
        less = ranks.share[expert] - share
        if copies >= goal.limit or 2 * less <= best.worth:
            continue
        for rank in range(len(goal.capacity) if spare > 0 else 0):
            if ranks.used[rank] < goal.capacity[rank] and not ranks.holds[rank, expert]:
                height = max(top - less, ranks.rank_load[rank] + share)
                worth = _worth(top - max(height, goal.floor), int(strange[rank, expert]))
                if worth > best.worth:
                    best = Step(ADD, slot, rank, 0, worth)
        for other in replicated:
            for rank in ranks.holders[other, : ranks.copies[other]]:
                if ranks.holds[rank, expert] or goal.pinned[rank, other]:
                    continue
                height = max(top - less, ranks.rank_load[rank] + share - ranks.share[other])
                moves = int(strange[rank, expert]) - int(strange[rank, other])
                if _worth(top - max(height, goal.floor), moves) > best.worth:
                    height = max(height, _height_without(ranks, load, other, rank, expert, less))
                    worth = _worth(top - max(height, goal.floor), moves)
                    if worth > best.worth:
                        other_slot = np.flatnonzero(ranks.held[rank] == other)[0]
                        best = Step(REPLACE, slot, rank, other_slot, worth)
    return best


@kernel
def _take_step(ranks: Ranks, load: Loads, slow: int, step: Step) -> int:
    """Returns by how many copies there are more."""
    if step.kind == MOVE:
        _put(ranks, load, _take(ranks, load, slow, step.slot), step.rank)
    elif step.kind == SWAP:
        given = _take(ranks, load, slow, step.slot)
        taken = _take(ranks, load, step.rank, step.other_slot)
        _put(ranks, load, given, step.rank)
        _put(ranks, load, taken, slow)
    elif step.kind == DROP:
        _take(ranks, load, slow, step.slot)
        return -1
    else:
        expert = ranks.held[slow, step.slot]
        if step.kind == REPLACE:
            _take(ranks, load, step.rank, step.other_slot)
        _put(ranks, load, expert, step.rank)
        return 1 if step.kind == ADD else 0
    return 0


@kernel
def improve(held: Slots, load: Loads, goal: Goal, extra: int, max_steps: int) -> float:
    """Search from `held` (ranks, slots), changed in place, until every rank is light enough, nothing helps or
    `max_steps` are done; at most `extra` copies beyond one of each. Answers the slowest rank's load.

    Where weights move, copies are recounted unless an exchange does all there is to do with one expert moved; else only
    where exchanging does not help, which is twice as fast.
    """
    ranks = _ranks(held, load)
    spare = extra - (ranks.copies.sum() - len(load))
    for _ in range(max_steps):
        slow = np.argmax(ranks.rank_load)
        top = ranks.rank_load[slow]
        if top <= goal.target:
            break
        best = _best_exchange(ranks, goal, slow, Step(NOTHING, 0, 0, 0, top * _LEAST))
        if best.kind == NOTHING or (goal.floor > 0.0 and best.worth < _worth(top - goal.floor, 1)):
            best = _best_recount(ranks, load, goal, spare, slow, best)
        if best.kind == NOTHING:
            break
        spare -= _take_step(ranks, load, slow, best)
    return ranks.rank_load.max()
