"""Other numbers of copies, where the search is stuck because its copies do not fit together.

The search changes one rank's copies at a time. Where ranks have few slots, a different number of copies of one expert
pays only when everything is packed anew.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from omni_placement.layout import EMPTY, Numbers
from omni_placement.solving.layer import Layer
from omni_placement.solving.replicas import LayerPlan

TRIES, STEPS, LIGHTEST = 6, 64, 12
"""Packings tried for a layer, steps of the search after each, and experts considered to give a copy away."""


def repacked(layer: Layer, plan: LayerPlan) -> LayerPlan:
    """The plan, packed anew with other numbers of copies while that lowers it and tries are left."""
    tries = TRIES
    is_better = True
    while is_better and plan.height > layer.target:
        is_better = False
        for copies in islice(_recounts(layer, plan), tries):
            tries -= 1
            other = layer.packed(copies, plan.extra, STEPS)
            if is_better := other.height < plan.height:
                plan = other
                break
    return plan


def _recounts(layer: Layer, plan: LayerPlan) -> Iterator[Numbers]:
    """One more of an expert on the slowest rank, in place of one of the lightest shares where no copy is spare; or one
    less of it. The expert with the largest share there comes first."""
    copies = np.bincount(plan.held[plan.held != EMPTY], minlength=len(layer.load))
    share = np.append(layer.load / copies, 0.0)  # EMPTY is the last
    slow = plan.held[np.argmax(share[plan.held].sum(axis=1))]
    givers = np.flatnonzero(copies > layer.least_copies)
    lightest = givers[np.argsort(share[givers], kind="stable")[:LIGHTEST]]
    is_spare = int(copies.sum()) - len(copies) < plan.extra
    for expert in slow[np.argsort(-share[slow], kind="stable")]:
        if expert == EMPTY:
            continue
        if copies[expert] < layer.limit:
            if is_spare:
                yield _changed(copies, expert, 1)
            for other in lightest:
                if other != expert:
                    yield _changed(_changed(copies, expert, 1), other, -1)
        if copies[expert] > layer.least_copies[expert]:
            yield _changed(copies, expert, -1)


def _changed(copies: Numbers, expert: int, change: int) -> Numbers:
    changed = copies.copy()
    changed[expert] += change
    return changed
