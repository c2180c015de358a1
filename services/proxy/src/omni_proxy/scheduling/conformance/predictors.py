"""Predictors of times."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from omni_proxy.scheduling.conformance.trials import SAMPLES, fail, guarded, shape
from omni_proxy.scheduling.interfaces import Predictor
from omni_proxy.scheduling.predictors import MakePredictor
from omni_proxy.scheduling.view import Floats, Rows

_NO_TIMES = (math.nan, math.inf, -1.0, 0.0, 1e300)


def check_predictor(make: MakePredictor, seed: int = 0) -> None:
    """Raises AssertionError: what the predictor does wrong."""
    draw = np.random.default_rng(seed)
    one, other = make(3), make(3)
    truth = np.array([5.0, 0.1, 0.02])
    taught, idle = (guarded(partial(one.add, truth * 2)) for _ in range(2))
    rows = np.array([taught, idle])
    if taught == idle or other.add(truth * 2) != taught or other.add(truth * 2) != idle:
        fail("add() gave two rows one number, or two predictors made alike gave other numbers")
    idle_before = one.milliseconds(rows[1:], np.ones((1, 3)))
    for number, features in enumerate(_features(draw)):
        seen_ms = _NO_TIMES[number % 5] if number % 7 == 0 else float(features @ truth)
        before = guarded(partial(one.milliseconds, rows[:1], features[None, :]))
        predicted = guarded(partial(one.observe, taught, features, seen_ms))
        _check_predictions(before, 1)
        if abs(predicted - float(before[0])) > 1e-6 * max(1.0, predicted):
            fail(f"observe() said {predicted} had been predicted, and milliseconds() had said {float(before[0])}")
        if seen_ms in _NO_TIMES and not np.array_equal(before, one.milliseconds(rows[:1], features[None, :])):
            fail(f"an observation of {seen_ms} ms, which cannot be, changed what it predicts")
        other.observe(taught, features, seen_ms)
    probe = np.array([[1.0, 100.0, 10.0], [0.0, 0.0, 0.0]])
    predictions = guarded(partial(one.milliseconds, rows, probe))
    _check_predictions(predictions, 2)
    if not np.array_equal(predictions, other.milliseconds(rows, probe)):
        fail("two made alike predicted differently after the same observations")
    if not np.array_equal(idle_before, one.milliseconds(rows[1:], np.ones((1, 3)))):
        fail("what was observed on one row changed another")
    _check_rows(one, rows)


def _check_rows(one: Predictor, rows: Rows) -> None:
    confidence = guarded(partial(one.confidence, rows))
    if confidence.shape != rows.shape or not ((confidence >= 0) & (confidence <= 1)).all():
        fail(f"confidence() returned {confidence}, not a share in [0, 1] for each row")
    if one.confidence(rows[1:])[0] != 0:
        fail("confidence() is above 0 for a row on which nothing was observed")
    if one.counts(rows).shape != rows.shape or one.typical(rows).shape != (3,):
        fail("counts() has one number per row, typical() one per feature")
    one.restart(int(rows[0]))
    _check_predictions(one.milliseconds(rows, np.ones((2, 3))), 2)
    one.remove(int(rows[0]))
    again = one.add(np.array([7.0, 0.0, 0.0]))
    if abs(float(one.milliseconds(np.array([again]), np.array([[1.0, 9.0, 9.0]]))[0]) - 7.0) > 1e-6:
        fail("a row that was removed and given to another does not start from the prior of its own")


def _check_predictions(ms: Any, size: int) -> None:
    if not isinstance(ms, np.ndarray) or ms.shape != (size,):
        fail(f"milliseconds() returned {shape(ms)} for {size} rows")
    if not (np.isfinite(ms) & (ms >= 0)).all():
        fail(f"milliseconds() returned {ms}: a prediction is finite and never negative")


def _features(draw: np.random.Generator) -> Iterator[Floats]:
    for _ in range(SAMPLES):
        features = np.array([1.0, draw.integers(0, 10_000), draw.integers(0, 500)], np.float64)
        features.flags.writeable = False
        yield features
