"""Plans of a layer for rising numbers of copies.

What a plan is made from depends on the slots there are, never on the budget: so a larger budget only adds plans to
choose from, and no step gets longer by it.
"""

from functools import cached_property

import numpy as np

from omni_placement.solving.layer import Layer
from omni_placement.solving.recounts import repacked
from omni_placement.solving.replicas import LayerPlan

FEW = 1, 2, 3, 4, 6, 8, 12, 16, 24, 32
"""Small numbers of copies, tried where a budget is shared out."""
FEWEST, MOST = 4, 32
"""Numbers of copies tried between none and all; four per slot of a rank within these."""


class Levels:
    """Plans are made when they are asked for, and kept."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._plans: dict[int, LayerPlan] = {}

    def best(self) -> LayerPlan:
        """The lowest plan found, for as many copies as there is room for: with all of them where that is low enough,
        since a load that lies on more copies of its experts drifts less; else with any number of them."""
        layer = self._layer
        for extra in reversed(self._extras):
            if layer.bound(extra) <= layer.target and (plan := self._plan(extra)).height <= layer.target:
                return plan
        least = min((plan.height for plan in self._plans.values()), default=np.inf)
        plans = [self._plan(extra) for extra in self._extras if layer.bound(extra) < least or extra in self._plans]
        return self._polished(min(plans, key=_height))

    def frontier(self) -> list[LayerPlan]:
        """Plans with rising `extra` and falling `height`, from the fewest copies to where more do not help."""
        best = self.best()
        plans: list[LayerPlan] = []
        for extra in sorted({*self._few, *self._extras}):
            plan = self._plan(extra)
            if not plans or plan.height < plans[-1].height:
                plans.append(plan)
            if plan.height <= self._layer.target:
                return plans
        return [*(plan for plan in plans if plan.height > best.height), best]

    @cached_property
    def _few(self) -> list[int]:
        """The first copies gain most: these lie below the second of `_extras`."""
        least, second = self._extras[0], self._extras[min(1, len(self._extras) - 1)]
        return [least + copies for copies in FEW if least + copies < second]

    @cached_property
    def _extras(self) -> list[int]:
        least, most = self._layer.least_extra, self._layer.most_extra
        count = int(np.clip(4 * -(-most // len(self._layer.capacity)), FEWEST, MOST))
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
