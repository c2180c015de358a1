"""One layer of a problem, and plans of it."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from omni_placement.layout import EMPTY, Numbers, Slots
from omni_placement.problem import Loads
from omni_placement.solving.packing import pack
from omni_placement.solving.replicas import LayerPlan, give_copies
from omni_placement.solving.search import Goal, improve

GAP = 5e-4
"""A plan this close to the lower bound, relative to it, is not improved further."""
MAX_STEPS = 1000


@dataclass(frozen=True)
class Layer:
    """`load` (experts,), `capacity` (ranks,), `pinned` (ranks, experts), at most `limit` copies of an expert, `width`
    slots on a rank."""

    load: Loads
    capacity: Numbers
    pinned: npt.NDArray[np.bool_]
    limit: int
    width: int

    @cached_property
    def least_copies(self) -> Numbers:
        """Of each expert: one, or as many as are pinned."""
        copies: Numbers = np.maximum(np.bincount(self._pinned_pairs[1], minlength=len(self.load)), 1)
        return copies

    @cached_property
    def least_extra(self) -> int:
        """Copies beyond one per expert that pins ask for."""
        return int(self.least_copies.sum()) - len(self.load)

    @cached_property
    def most_extra(self) -> int:
        """Copies beyond one per expert that there is room for."""
        return min(int(self.capacity.sum()), len(self.load) * self.limit) - len(self.load)

    @cached_property
    def target(self) -> float:
        """Height at which a plan is good enough, whatever its number of copies."""
        return (1 + GAP) * self.bound(self.most_extra)

    def bound(self, extra: int) -> float:
        """No plan with `extra` copies is lower: the mean over ranks, and the largest share."""
        return max(self._mean, float(self._given[1][extra - self.least_extra]))

    def copies(self, extra: int) -> Numbers:
        """Of each expert, with the smallest largest share that `extra` copies make."""
        given = self._given[0][: extra - self.least_extra]
        return self.least_copies + np.bincount(given, minlength=len(self.load))

    @cached_property
    def needs_no_packing(self) -> bool:
        """Ranks have one slot, and nothing is pinned."""
        return self.width == 1 and not len(self._pinned_pairs[0])

    def dealt(self) -> LayerPlan:
        """Where that needs no packing: as many copies as there is room for, rank after rank."""
        order, largest = self._given
        experts = np.concatenate([np.arange(len(self.load)), order])
        held = np.full((len(self.capacity), 1), EMPTY, dtype=np.int32)
        held[np.flatnonzero(self.capacity)[: len(experts)], 0] = experts
        return LayerPlan(float(largest[-1]), self.most_extra, held)

    def packed(self, copies: Numbers, extra: int, max_steps: int = MAX_STEPS) -> LayerPlan:
        """From nothing, with about `copies` of each expert."""
        held = self.pins()
        height = pack(self.load, copies, self.capacity, held)
        if height <= self.target and np.count_nonzero(held != EMPTY) == copies.sum():
            return LayerPlan(height, extra, held)
        return self.improved(held, extra, max_steps)

    def improved(self, held: Slots, extra: int, max_steps: int = MAX_STEPS) -> LayerPlan:
        """`held`, changed in place by the search."""
        goal = Goal(self.capacity, self.pinned, self._nowhere, self.limit, self.target, 0.0)
        return LayerPlan(improve(held, self.load, goal, extra, max_steps), extra, held)

    def improved_near(
        self, held: Slots, extra: int, strange: npt.NDArray[np.bool_], target: float, max_steps: int = MAX_STEPS
    ) -> LayerPlan:
        """The same with few experts where they are `strange` (ranks, experts), until no rank is above `target`."""
        goal = Goal(self.capacity, self.pinned, strange, self.limit, target, target)
        return LayerPlan(improve(held, self.load, goal, extra, max_steps), extra, held)

    def pins(self) -> Slots:
        """(ranks, slots) with the pinned experts from the start of each rank's slots."""
        return self._pins.copy()

    @cached_property
    def _nowhere(self) -> npt.NDArray[np.bool_]:
        return np.zeros_like(self.pinned)

    @cached_property
    def _mean(self) -> float:
        return float(self.load.sum()) / int(np.count_nonzero(self.capacity))

    @cached_property
    def _given(self) -> tuple[Numbers, Loads]:
        return give_copies(self.load, self.least_copies, self.limit, self.most_extra - self.least_extra)

    @cached_property
    def _pins(self) -> Slots:
        held = np.full((len(self.capacity), self.width), EMPTY, dtype=np.int32)
        used = np.zeros(len(held), dtype=np.int64)
        for rank, expert in zip(*self._pinned_pairs, strict=True):
            held[rank, used[rank]] = expert
            used[rank] += 1
        return held

    @cached_property
    def _pinned_pairs(self) -> tuple[Numbers, Numbers]:
        """Ranks and experts."""
        return np.divmod(np.flatnonzero(self.pinned), len(self.load))
