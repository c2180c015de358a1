"""The load book: windows per stream, forecasts of rate and shares, and what is learned beside them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_common.errors import InvalidRequest, ResourceExhausted
from omni_placement.load import Forecast, LoadBook, LoadRules, Phase, Smoothing, Stream, Window
from omni_placement.load.forecast import share_error

SMOOTHING = Smoothing(interval_s=60, horizon_s=600)
RULES = LoadRules(smoothing=SMOOTHING)
P, D = Phase.PREFILL, Phase.DECODE


def window(step: int, tokens: list[list[int]], phase: Phase = D, traffic_class: str = "", worker: str = "w") -> Window:
    return Window(worker, step, step, np.array(tokens), phase, traffic_class)


def expected(book: LoadBook, now_s: float, phase: Phase | None = None, horizon_s: float = 600) -> Forecast:
    forecast = book.forecast("m", "g", horizon_s, now_s, phase)
    assert forecast is not None
    return forecast


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 100), min_size=1, max_size=30), bound=st.integers(1, 5))
def test_total_is_of_the_newest_windows_and_a_repeat_is_ignored(counts: list[int], bound: int) -> None:
    book = LoadBook(LoadRules(windows=bound))
    for step, count in enumerate(counts):
        assert book.add("m", "g", window(step, [[count, 1]]), at_s=step)
        assert not book.add("m", "g", window(step, [[count, 1]]), at_s=step)
    total = book.total("m", "g")
    assert total is not None and total.tolist() == [[sum(counts[-bound:]), min(bound, len(counts))]]


def test_a_repeat_does_not_count_in_the_forecast() -> None:
    once, twice = LoadBook(RULES), LoadBook(RULES)
    for step in range(10):
        for book, times in ((once, 1), (twice, 3)):
            for _ in range(times):
                book.add("m", "g", window(step, [[60, 30]]), at_s=60 * step + 1)
    assert expected(once, 600).load.tolist() == expected(twice, 600).load.tolist()


def test_same_steps_of_another_worker_or_stream_are_another_report() -> None:
    book = LoadBook(RULES)
    for report in (window(1, [[1, 0]]), window(1, [[1, 0]], worker="x"), window(1, [[1, 0]], phase=P)):
        assert book.add("m", "g", report, at_s=0)
    assert book.total("m", "g") is not None and book.total("m", "other") is None


def test_streams_are_kept_apart_and_phases_add_up() -> None:
    book = LoadBook(RULES)
    for step in range(20):
        book.add("m", "g", window(step, [[60, 0]], phase=P), at_s=60 * step + 1)
        book.add("m", "g", window(step, [[0, 120]], phase=D, traffic_class="chat"), at_s=60 * step + 2)
    now_s = 1200.0
    assert [(s.stream, s.windows, s.age_s) for s in book.streams("m", "g", now_s)] == [
        (Stream(D, "chat"), 20, 58.0),
        (Stream(P, ""), 20, 59.0),
    ]
    np.testing.assert_allclose(expected(book, now_s, P).load, [[600, 0]])
    np.testing.assert_allclose(expected(book, now_s, D).load, [[0, 1200]])
    np.testing.assert_allclose(expected(book, now_s).load, [[600, 1200]])


def test_before_an_interval_has_ended_the_reports_are_the_forecast() -> None:
    book = LoadBook(RULES)
    assert book.forecast("m", "g", 600, 0) is None
    book.add("m", "g", window(1, [[30, 10]]), at_s=3)
    np.testing.assert_allclose(expected(book, 4).shares, [[0.75, 0.25]])


def test_mix_of_classes_follows_their_rates_at_once() -> None:
    """Shares of each class are known, so a new mix needs no new shares."""

    def report(book: LoadBook, minute: int, chat: int, code: int) -> None:
        book.add("m", "g", window(minute, [[chat, 0]], traffic_class="chat"), at_s=60 * minute + 1)
        book.add("m", "g", window(minute, [[0, code]], traffic_class="code"), at_s=60 * minute + 1)

    book = LoadBook(RULES)
    for minute in range(60):
        report(book, minute, 900, 100)
    for minute in range(60, 90):
        report(book, minute, 100, 900)
    np.testing.assert_allclose(expected(book, 90 * 60).shares, [[0.1, 0.9]], atol=0.06)


def test_a_step_is_followed_at_once_and_back() -> None:
    """After hours of noise the memories are long; a jump far beyond that noise shortens them."""
    random, book = np.random.default_rng(4), LoadBook(RULES)
    before, after = np.array([[700.0, 200, 100]]), np.array([[100.0, 200, 700]])
    course = [before] * 300 + [after] * 5 + [before] * 3
    errors = []
    for minute, mean in enumerate(course):
        book.add("m", "g", Window("w", minute, minute, random.poisson(mean), D), at_s=60 * minute + 1)
        errors.append(share_error(expected(book, 60 * minute + 60).load, mean))
    assert max(errors[200:300]) < 0.05
    assert errors[301] < 0.05 and errors[306] < 0.05


def test_a_quiet_interval_moves_the_shares_little() -> None:
    random, book, shares = np.random.default_rng(6), LoadBook(RULES), np.array([0.8, 0.2])
    for minute in range(60):
        book.add("m", "g", window(minute, [random.multinomial(1_000_000, shares).tolist()]), at_s=60 * minute + 1)
    book.add("m", "g", window(60, [[2, 8]]), at_s=60 * 60 + 1)
    np.testing.assert_allclose(expected(book, 61 * 60).shares, [[0.8, 0.2]], atol=0.005)


def test_a_trend_is_used_where_it_has_predicted_better() -> None:
    """Shares that move steadily: forecasts with the trend are closer, and the book finds out by itself."""
    book, flat = LoadBook(RULES), LoadBook(LoadRules(smoothing=Smoothing(60, damping=0.0)))
    for minute in range(240):
        share = 0.2 + 0.6 * minute / 240
        tokens = [[round(1e6 * share), round(1e6 * (1 - share))]]
        for each in (book, flat):
            each.add("m", "g", window(minute, tokens), at_s=60 * minute + 1)
    ahead, level = expected(book, 240 * 60), expected(flat, 240 * 60)
    to_come = np.array([[0.8 + 0.6 * 5.5 / 240, 0.2 - 0.6 * 5.5 / 240]])
    assert share_error(ahead.load, to_come) < 0.6 * share_error(level.load, to_come)
    assert ahead.error is not None and level.error is not None and ahead.error < level.error


def test_noise_around_a_constant_does_not_pass_for_a_trend() -> None:
    random, book = np.random.default_rng(3), LoadBook(RULES)
    mean = 1000 * random.dirichlet(np.full(16, 5.0), size=2)
    for minute in range(300):
        tokens = random.poisson(mean)
        book.add("m", "g", Window("w", minute, minute, tokens, D), at_s=60 * minute + 1)
    forecast = expected(book, 300 * 60)
    assert share_error(forecast.load, mean) < 0.05
    # The spread covers what is missed: few experts lie more than three of it off.
    off = np.abs(forecast.load - 10 * mean) / forecast.spread
    assert (off < 3).mean() > 0.9
    assert forecast.error is not None and forecast.error < 0.05


def test_silence_fades_and_the_horizon_scales() -> None:
    book = LoadBook(RULES)
    for minute in range(30):
        book.add("m", "g", window(minute, [[60, 60]]), at_s=60 * minute + 1)
    assert expected(book, 1800, horizon_s=1200).load.sum() == pytest.approx(2 * expected(book, 1800).load.sum())
    assert expected(book, 1800 + 3600).load.sum() < 0.01 * 1200
    assert expected(book, 1e9).load.sum() < 1e-3


def test_a_clock_that_goes_back_loses_nothing() -> None:
    book = LoadBook(RULES)
    book.add("m", "g", window(1, [[60, 0]]), at_s=1000)
    book.add("m", "g", window(2, [[60, 0]]), at_s=10)
    assert expected(book, 1020).load.sum() == pytest.approx(1200)


def test_books_are_bounded() -> None:
    book = LoadBook(LoadRules(groups=1, streams=2, smoothing=SMOOTHING))
    for index in range(20):
        book.add("m", "g", window(index, [[1, 1]], traffic_class=f"class {index}"), at_s=0)
    # Classes without a place of their own are counted together, not lost.
    assert len(book.streams("m", "g", 0)) == 3
    total = book.total("m", "g")
    assert total is not None and total.tolist() == [[20, 20]]
    with pytest.raises(ResourceExhausted):
        book.add("m", "other", window(1, [[1, 1]]), at_s=0)


def test_a_new_shape_starts_afresh_and_windows_have_a_length() -> None:
    book = LoadBook(RULES)
    book.add("m", "g", window(1, [[1, 2]]), at_s=0)
    book.add("m", "g", window(3, [[5]]), at_s=1)
    total = book.total("m", "g")
    assert total is not None and total.tolist() == [[5]]
    with pytest.raises(InvalidRequest):
        Window("w", 2, 1, np.array([[1]]))


def test_ms_per_token_is_learned_from_steps_and_bounded_where_they_are_noise() -> None:
    random, book = np.random.default_rng(1), LoadBook(RULES)
    assert book.ms_per_token("m", "g") is None
    for step in range(40):
        ranks = random.integers(500, 5000, (3, 4))
        ms = 20 + 0.002 * ranks.max(axis=1).sum() + random.normal(0, 0.5)
        book.add("m", "g", Window("w", step, step, np.ones((3, 8), int), duration_ms=ms, rank_tokens=ranks), at_s=step)
    assert book.ms_per_token("m", "g") == pytest.approx(0.002, rel=0.05)
    least = np.inf
    for step in range(40):
        ranks, ms = random.integers(990, 1010, (3, 4)), random.normal(20, 5)
        noisy = Window("w", step, step, np.ones((3, 8), int), duration_ms=ms, rank_tokens=ranks)
        book.add("m", "noisy", noisy, at_s=step)
        least = min(least, ms / ranks.max(axis=1).sum())
    # Steps that say nothing of tokens: no more than a part of the time in which all of them were computed.
    assumed = book.ms_per_token("m", "noisy")
    assert assumed is not None and 0 < assumed < least


def test_ms_per_token_is_a_share_of_the_first_steps_which_stalls_do_not_raise() -> None:
    book = LoadBook(RULES)

    def after(step: int, tokens: int, ms: float) -> float | None:
        ranks = np.array([[tokens, 0], [tokens // 2, tokens]])
        book.add("m", "g", Window("w", step, step, np.ones((2, 8), int), duration_ms=ms, rank_tokens=ranks), at_s=step)
        return book.ms_per_token("m", "g")

    assert after(1, 0, 5.0) is None
    assert after(2, 100, 5000.0) == pytest.approx(0.3 * 25)
    assert after(3, 1000, 50.0) == pytest.approx(0.3 * 0.025)
    assert after(4, 1000, 9000.0) == after(5, 10, 50.0) == pytest.approx(0.3 * 0.025)


def test_a_group_that_is_forgotten_makes_room() -> None:
    book = LoadBook(LoadRules(groups=1))
    book.add("m", "g", window(1, [[1, 1]]), at_s=0)
    with pytest.raises(ResourceExhausted):
        book.add("m", "other", window(1, [[1, 1]]), at_s=0)
    book.forget("m", "g")
    assert book.add("m", "other", window(1, [[1, 1]]), at_s=0)
    assert book.total("m", "g") is None
