"""Few moves: a plan's ranks matched to those of the layout in force, or that layout itself as the place to start."""

# mypy: disable-error-code="assignment,arg-type,no-any-return"
# Scalars are annotated `int` and `float`; to mypy, what comes out of an array is something else.

import numpy as np
import numpy.typing as npt

from omni_common.compiled import kernel
from omni_placement.layout import EMPTY, Numbers, Slots, Topology
from omni_placement.solving.layer import Layer
from omni_placement.solving.packing import pack
from omni_placement.solving.replicas import LayerPlan
from omni_placement.solving.slack import bring_home

CLOSE = 0.01
"""How much higher than a fresh plan's slowest rank one may be that moves less."""


def near(topology: Topology, layer: Layer, plan: LayerPlan, old: Slots, extra: int) -> Slots:
    """A layer's (ranks, slots) with few moves from `old`, not more than `CLOSE` above the plan: the plan on ranks that
    match it, or `old` improved that far, whichever moves less. What stays on a rank stays in its slot."""
    strange = _absent(old, topology.num_experts)
    target = (1 + CLOSE) * plan.height
    kept = layer.pins()
    copies = _keep(old, kept, layer.capacity, layer.pinned, layer.limit, extra)
    pack(layer.load, copies, layer.capacity, kept)
    close = layer.improved_near(kept, extra, strange, target)
    choices = [_match_ranks(plan.held, old, _may_take(topology, layer))]
    if close.height <= target:
        choices.append(close.held)
    for held in choices:
        bring_home(held, layer.load, layer.capacity, layer.pinned, strange.astype(np.float64), target)
    return _settle(min(choices, key=lambda held: _num_moves(held, strange)), old, layer.capacity)


def _may_take(topology: Topology, layer: Layer) -> npt.NDArray[np.bool_]:
    """(contents of a rank, ranks): alike in slots, on the same host where groups have hosts, pinned contents stay."""
    may_take: npt.NDArray[np.bool_] = layer.capacity[:, None] == layer.capacity
    if topology.num_groups > 1:
        may_take &= topology.hosts[:, None] == topology.hosts
    bound = layer.pinned.any(axis=1)
    may_take[bound] = may_take[:, bound] = False
    may_take[bound, bound] = True
    return may_take


@kernel
def _keep(old: Slots, held: Slots, capacity: Numbers, pinned: npt.NDArray[np.bool_], limit: int, extra: int) -> Numbers:
    """Put into `held` (ranks, slots), which holds the pinned experts, what of `old` may stay: first one copy of every
    expert, then further ones while `extra` and the slots that missing experts need allow. Answers copies, (experts,).
    """
    ranks = len(pinned)
    copies = pinned.sum(axis=0)
    used = pinned.sum(axis=1)
    for is_further in (False, True):
        missing = (copies == 0).sum()
        free = capacity.sum() - used.sum()
        extra_left = extra - np.maximum(copies - 1, 0).sum()
        for rank in range(ranks):
            for slot in range(old.shape[1]):
                expert = old[rank, slot]
                if expert == EMPTY or used[rank] >= capacity[rank] or (held[rank] == expert).any():
                    continue
                if is_further and not (free > missing and extra_left > 0 and copies[expert] < limit):
                    continue
                if not is_further and copies[expert] > 0:
                    continue
                held[rank, used[rank]] = expert
                used[rank] += 1
                copies[expert] += 1
                free -= 1
                extra_left -= is_further
    return np.maximum(copies, 1)


@kernel
def _match_ranks(held: Slots, old: Slots, may_take: npt.NDArray[np.bool_]) -> Slots:
    """The contents of `held`'s ranks on other ranks, so that much stays where `old` has it.

    Pairs of contents and ranks are taken in falling order of common experts, where `may_take` (contents, ranks) allows;
    contents with nothing in common go to what is left, to their own rank first.
    """
    ranks = len(held)
    common = np.zeros((ranks, ranks), dtype=np.int64)
    for content in range(ranks):
        for rank in range(ranks):
            if may_take[content, rank]:
                for slot in range(held.shape[1]):
                    if held[content, slot] != EMPTY and (old[rank] == held[content, slot]).any():
                        common[content, rank] += 1
    content_of = np.full(ranks, -1, dtype=np.int64)
    is_placed = np.zeros(ranks, dtype=np.bool_)
    for shared in range(held.shape[1], 0, -1):
        for content in range(ranks):
            for rank in range(ranks):
                if common[content, rank] == shared and not is_placed[content] and content_of[rank] < 0:
                    content_of[rank] = content
                    is_placed[content] = True
    for rank in range(ranks):
        if content_of[rank] < 0 and not is_placed[rank]:
            content_of[rank] = rank
            is_placed[rank] = True
    for rank in range(ranks):
        for content in range(ranks):
            if content_of[rank] < 0 and not is_placed[content] and may_take[content, rank]:
                content_of[rank] = content
                is_placed[content] = True
    return held[content_of] if (content_of >= 0).all() else held


@kernel
def _settle(held: Slots, old: Slots, capacity: Numbers) -> Slots:
    """The same contents, with every expert that was on its rank before in the slot that it had, if there still is."""
    settled = np.full_like(held, EMPTY)
    for rank in range(len(held)):
        for slot in range(capacity[rank]):
            if old[rank, slot] != EMPTY and (held[rank] == old[rank, slot]).any():
                settled[rank, slot] = old[rank, slot]
        free = 0
        for expert in held[rank]:
            if expert != EMPTY and not (settled[rank] == expert).any():
                while settled[rank, free] != EMPTY:
                    free += 1
                settled[rank, free] = expert
    return settled


def _absent(old: Slots, num_experts: int) -> npt.NDArray[np.bool_]:
    """(ranks, experts): where `old` (ranks, slots) does not have an expert."""
    away = np.ones((len(old), num_experts), dtype=np.bool_)
    ranks, slots = np.nonzero(old != EMPTY)
    away[ranks, old[ranks, slots]] = False
    return away


def _num_moves(held: Slots, away: npt.NDArray[np.bool_]) -> int:
    """Experts on ranks that they are absent from before."""
    ranks, slots = np.nonzero(held != EMPTY)
    return int(away[ranks, held[ranks, slots]].sum())
