"""Drift: what is noise, what is a burst, what lasts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_placement.load import LoadBook, LoadRules, Phase, Smoothing, Window
from omni_placement.load.drift import DriftDetector, DriftKind, DriftRule, chi_square_threshold, g_statistic

EXPERTS, TOKENS = 64, 20_000


def popularity(seed: int, layers: int = 4) -> np.ndarray:
    weight = np.exp(np.random.default_rng(seed).standard_normal((layers, EXPERTS)))
    return weight / weight.sum(axis=1, keepdims=True)


def draw(random: np.random.Generator, shares: np.ndarray, tokens: int = TOKENS) -> np.ndarray:
    return np.stack([random.multinomial(tokens, row) for row in shares]).astype(float)


@pytest.mark.parametrize(
    ("freedom", "chance", "exact"),
    [(10, 0.05, 18.307), (3, 0.01, 11.345), (100, 1e-4, 161.319), (255, 1e-6, 378.9)],
)
def test_threshold_is_that_of_the_tables(freedom: int, chance: float, exact: float) -> None:
    assert chi_square_threshold(freedom, chance) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("tokens", [300, 3000, 100_000])
def test_false_alarms_are_as_rare_as_stated(tokens: int) -> None:
    """5,000 intervals without drift at a rate of 1%: within five standard deviations above it."""
    random, shares, alarms, runs = np.random.default_rng(tokens), popularity(1, layers=2), 0, 5000
    detector = DriftDetector(DriftRule(false_alarms=0.01))
    detector.planned(draw(random, shares, 20 * tokens))
    for _ in range(runs):
        alarms += detector.observe(draw(random, shares, tokens)).excess > 1
    assert alarms / runs < 0.01 + 5 * np.sqrt(0.01 * 0.99 / runs) + 0.004


def test_clustered_tokens_do_not_raise_alarms() -> None:
    """Tokens that come in tens of the same expert vary more than independent ones; the detector learns by how much."""
    random, shares, detector = np.random.default_rng(2), popularity(1), DriftDetector(DriftRule(false_alarms=0.001))
    detector.planned(10 * draw(random, shares, 100 * TOKENS))
    kinds = [detector.observe(10 * draw(random, shares, TOKENS // 10)).kind for _ in range(400)]
    assert detector.dispersion == pytest.approx(10, rel=0.2)
    assert kinds[100:].count(DriftKind.NONE) >= 297
    assert DriftKind.LASTING not in kinds


def test_burst_passes_and_change_lasts() -> None:
    random, detector = np.random.default_rng(3), DriftDetector(DriftRule())
    before, after = popularity(1), popularity(2)
    detector.planned(draw(random, before, 50 * TOKENS))

    def kinds(shares: np.ndarray, intervals: int) -> list[DriftKind]:
        return [detector.observe(draw(random, shares)).kind for _ in range(intervals)]

    assert set(kinds(before, 20)) == {DriftKind.NONE}
    assert set(kinds(after, 4)) == {DriftKind.BURST}
    assert set(kinds(before, 20)[-10:]) == {DriftKind.NONE}
    assert kinds(after, 10)[-1] is DriftKind.LASTING


def test_slow_drift_adds_up() -> None:
    random, detector = np.random.default_rng(4), DriftDetector(DriftRule())
    first, last = popularity(1), popularity(2)
    detector.planned(draw(random, first, 50 * TOKENS))
    kinds = [detector.observe(draw(random, first + (last - first) * 0.002 * i)).kind for i in range(120)]
    assert kinds[0] is DriftKind.NONE and kinds[-1] is DriftKind.LASTING
    assert kinds.index(DriftKind.LASTING) > 5


def test_intervals_without_tokens_or_plan_say_nothing() -> None:
    detector = DriftDetector(DriftRule())
    assert detector.observe(np.ones((2, 2))).kind is DriftKind.NONE
    detector.planned(np.array([[1000.0, 0], [1000, 0]]))
    far = detector.observe(np.array([[0, 1000.0], [1000, 0]]))
    assert far.kind is DriftKind.BURST and far.distance == pytest.approx(0.5)
    assert detector.observe(np.zeros((2, 2))) == far


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.1, 1e6))
def test_statistic_is_symmetric_not_negative_and_zero_for_equal_shares(seed: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    first, second = random.random((3, 8)) * scale, random.random((3, 8)) * scale
    one, freedom = g_statistic(first, second)
    other, _ = g_statistic(second, first)
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    assert (one >= 0).all() and (freedom <= 8).all()
    np.testing.assert_allclose(g_statistic(first, 3 * first)[0], 0, atol=1e-6 * scale)


def test_book_measures_drift_from_the_load_it_planned_for() -> None:
    random, before, after = np.random.default_rng(5), popularity(1), popularity(2)
    book = LoadBook(LoadRules(smoothing=Smoothing(interval_s=60)))

    def minute(index: int, shares: np.ndarray) -> None:
        window = Window("w", index, index, draw(random, shares).astype(np.int64), Phase.DECODE)
        book.add("m", "g", window, at_s=60 * index + 1)

    for index in range(20):
        minute(index, before)
    book.planned("m", "g", 1200)
    for index in range(20, 40):
        minute(index, after)
    far = book.drift("m", "g", 2400)
    assert far.kind is DriftKind.LASTING and far.distance > 0.3 > far.noise
    book.planned("m", "g", 2400)
    for index in range(40, 45):
        minute(index, after)
    assert book.drift("m", "g", 2700).distance < 0.2
    assert book.drift("m", "nobody", 2700).kind is DriftKind.NONE
