"""Filters and scorers: a column of answers, one per worker."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np

from omni_proxy.scheduling.conformance.policies import choice_of
from omni_proxy.scheduling.conformance.trials import (
    SAMPLES,
    fail,
    grows_linearly,
    guarded,
    keeps_little,
    shape,
    takes_little,
    unharmed,
)
from omni_proxy.scheduling.decision import Decision
from omni_proxy.scheduling.interfaces import Filter, Observer, Scorer
from omni_proxy.scheduling.policies import POLICIES
from omni_proxy.scheduling.samples import Sample, no_workers, samples

T = TypeVar("T")


def check_filter(make: Callable[[], Filter], seed: int = 0) -> None:
    """Raises AssertionError: what the filter does wrong."""

    def keep(one: Filter, sample: Sample) -> Any:
        return one.keep(sample.request, sample.view)

    def check(kept: Any, sample: Sample) -> None:
        if not isinstance(kept, np.ndarray) or kept.dtype != np.bool_ or kept.shape != (len(sample.view),):
            fail(f"keep() returned {shape(kept)} for {len(sample.view)} workers, not one bool for each")

    _check_columns(make, keep, check, seed)


def check_scorer(make: Callable[[], Scorer], seed: int = 0) -> None:
    """Raises AssertionError: what the scorer does wrong."""

    def score(one: Scorer, sample: Sample) -> Any:
        scores = one.score(sample.request, sample.view)
        if isinstance(one, Observer) and (decision := _any_decision(sample)) is not None:
            one.chosen(sample.request, sample.view, decision)
        return scores

    def check(scores: Any, sample: Sample) -> None:
        if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f" or scores.shape != (len(sample.view),):
            fail(f"score() returned {shape(scores)} for {len(sample.view)} workers, not one float for each")
        if not ((scores >= 0) & (scores <= 1)).all():
            wrong = scores[~((scores >= 0) & (scores <= 1))][0]
            fail(f"a score of {wrong} is not in [0, 1]")

    _check_columns(make, score, check, seed)


def _check_columns(
    make: Callable[[], T], call: Callable[[T, Sample], Any], check: Callable[[Any, Sample], None], seed: int
) -> None:
    one, other = make(), make()
    for sample in (no_workers(), *samples(seed, SAMPLES)):
        column = unharmed(sample, partial(call, one, sample))
        check(column, sample)
        again = guarded(partial(call, other, sample))
        if not np.array_equal(column, again):
            fail("two made alike answered differently for the same requests in a row")
    takes_little(make, call)
    grows_linearly(make, call)
    keeps_little(make, call)


def _any_decision(sample: Sample) -> Decision | None:
    return choice_of(POLICIES["least_loaded"].build("least_loaded"), sample)
