"""Plans of a layer for rising numbers of copies.

What a plan is made from depends on the slots there are, never on the budget: so a larger budget only adds plans to
choose from, and no step gets longer by it.
"""

from functools import cached_property

import numpy as np

from omni_placement.solving.layer import Layer
from omni_placement.solving.recounts import repacked
from omni_placement.solving.replicas import LayerPlan

FEW = 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32
"""Numbers of copies tried besides where a budget is shared out: the first copies gain most."""
FEWEST, MOST = 4, 32
"""Numbers of copies tried between none and all; two per slot of a rank within these."""
COST = 2e-3
"""How much higher than the best plan one may be, relative to it, that leaves no slot empty."""


class Levels:
    """Plans are made when they are asked for, and kept."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._plans: dict[int, LayerPlan] = {}

    def fullest(self) -> LayerPlan:
        """The best plan, or one that is as low but for `COST` and has every copy there is room for: a load that lies on
        more copies of its experts drifts less."""
        best = self.best()
        if self._layer.needs_no_packing:
            return best
        full = self._plan(self._layer.most_extra)
        return full if full.height <= (1 + COST) * best.height else best

    def best(self) -> LayerPlan:
        """The lowest plan found, with as many copies as one that is low enough can have."""
        layer = self._layer
        if layer.needs_no_packing:
            return layer.dealt()
        for extra in reversed(self._extras):
            if layer.bound(extra) <= layer.target and (plan := self._plan(extra)).height <= layer.target:
                return plan
        least = min((plan.height for plan in self._plans.values()), default=np.inf)
        plans = [self._plan(extra) for extra in self._extras if layer.bound(extra) < least or extra in self._plans]
        return self._polished(min(plans, key=_height))

    def frontier(self) -> list[LayerPlan]:
        """Plans with rising `extra` and falling `height`, from the fewest copies to where more do not help."""
        best, target = self.best(), self._layer.target
        plans: list[LayerPlan] = []
        for extra in sorted({*self._few, *self._extras}):
            plan = self._plan(extra)
            if plan.height <= target or plan.height == best.height:
                return [*plans, plan]
            if plan.height > best.height and (not plans or plan.height < plans[-1].height):
                plans.append(plan)
        return [*(plan for plan in plans if plan.extra < best.extra), best]

    @cached_property
    def _few(self) -> list[int]:
        layer = self._layer
        return [layer.least_extra + copies for copies in FEW if layer.least_extra + copies < layer.most_extra]

    @cached_property
    def _extras(self) -> list[int]:
        least, most = self._layer.least_extra, self._layer.most_extra
        count = int(np.clip(2 * -(-most // len(self._layer.capacity)), FEWEST, MOST))
        return sorted({least + (most - least) * step // count for step in range(count + 1)})

    def _plan(self, extra: int) -> LayerPlan:
        if extra not in self._plans:
            self._plans[extra] = self._layer.packed(self._layer.copies(extra), extra)
        return self._plans[extra]

    def _polished(self, plan: LayerPlan) -> LayerPlan:
        """The lowest of all plans with the rest of the copies added to them, then with copies counted anew."""
        layer, most = self._layer, self._layer.most_extra
        for extra in self._extras:
            if plan.height > layer.target and layer.bound(extra) < plan.height:
                grown = layer.improved(self._plan(extra).held.copy(), most)
                plan = min(plan, grown, key=_height)
        return repacked(layer, LayerPlan(plan.height, most, plan.held))


def _height(plan: LayerPlan) -> float:
    return plan.height
