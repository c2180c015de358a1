"""Linear times: what is learned, how fast, and what cannot spoil it."""

from collections.abc import Sequence
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_proxy.scheduling.linear import LONGEST_MS, Floats, LinearModel

PROMPT = np.array([8.0, 0.12, 0.004])
"""A worker's milliseconds: of any prompt, per token, per token and thousand tokens of its context."""
NOISE = 0.05


def prompts(rng: np.random.Generator, count: int, longest: int = 130_000) -> Floats:
    """Features of prompts, their lengths spread evenly over orders of magnitude."""
    new = np.exp(rng.uniform(0.0, np.log(longest), count))
    context = rng.choice([0, 1_000, 20_000], count) + new / 2
    return np.stack([np.ones(count), new, new * context / 1e3], axis=1)


def teach(
    model: LinearModel,
    row: int,
    rng: np.random.Generator,
    features: Floats,
    truth: Floats = PROMPT,
    outliers: float = 0,
) -> None:
    for x in features:
        factor = 50.0 if rng.random() < outliers else 1.0
        model.observe(row, x, factor * float(x @ truth) * np.exp(rng.normal(0.0, NOISE)))


def errors(model: LinearModel, row: int, truth: Floats = PROMPT, longest: int = 130_000) -> Floats:
    """Relative errors of predictions of prompts of all lengths."""
    x = prompts(np.random.default_rng(99), 300, longest)
    seen = x @ truth
    return np.abs(model.milliseconds(np.full(len(x), row), x) - seen) / seen


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param([10, 10, 10], id="too slow"),
        pytest.param([0.1, 0.1, 0.1], id="too fast"),
        pytest.param([0.1, 10, 10], id="mixed"),
        pytest.param([10, 0.1, 1], id="mixed too"),
        pytest.param([100, 100, 100], id="far off"),
    ],
)
def test_thirty_observations_undo_a_wrong_prior(wrong: Sequence[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = LinearModel(3)
    row = model.add(PROMPT * wrong)
    teach(model, row, rng, prompts(rng, 30))
    assert np.median(errors(model, row)) < 0.05
    assert np.quantile(errors(model, row), 0.95) < 0.15
    assert model.confidence(np.array([row]))[0] > 0.7


def test_coefficients_are_found() -> None:
    rng = np.random.default_rng(0)
    model = LinearModel(3)
    row = model.add(PROMPT * 10)
    teach(model, row, rng, prompts(rng, 1_000))
    np.testing.assert_allclose(model.coefficients(np.array([row]))[0], PROMPT, rtol=0.05)


def test_the_spread_is_that_of_the_noise() -> None:
    rng = np.random.default_rng(1)
    model = LinearModel(3)
    row = model.add(PROMPT)
    teach(model, row, rng, prompts(rng, 500))
    ms, sd = model.predict(np.full(50, row), prompts(rng, 50))
    assert np.all((sd / ms > 0.7 * NOISE) & (sd / ms < 1.6 * NOISE))
    assert 0.3 * NOISE < model.error(np.array([row]))[0] < 2 * NOISE


def test_short_prompts_alone_say_enough_of_long_ones_to_keep_them_sensible() -> None:
    rng = np.random.default_rng(2)
    model = LinearModel(3)
    row = model.add(PROMPT * 10)
    teach(model, row, rng, prompts(rng, 200, longest=500))
    assert np.quantile(errors(model, row, longest=500), 0.95) < 0.1
    assert errors(model, row).max() < 1.0


def test_a_term_that_does_not_matter_is_not_negative() -> None:
    rng = np.random.default_rng(3)
    model = LinearModel(3)
    row = model.add(PROMPT)
    flat = np.array([8.0, 0.12, 0.0])
    teach(model, row, rng, prompts(rng, 300), flat)
    assert (model.coefficients(np.array([row])) >= 0.0).all()
    assert np.quantile(errors(model, row, flat), 0.95) < 0.05


@pytest.mark.parametrize("seed", range(5))
def test_outliers_do_not_move_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = LinearModel(3)
    row = model.add(PROMPT * 3)
    teach(model, row, rng, prompts(rng, 50), outliers=0.02)
    for _ in range(20):
        teach(model, row, rng, prompts(rng, 20), outliers=0.02)
        assert np.quantile(errors(model, row), 0.95) < 0.1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factor", [0.1, 1 / 3, 1.3, 3.0, 10.0])
def test_a_lasting_shift_is_learned_within_twenty_observations(factor: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = LinearModel(3)
    row = model.add(PROMPT)
    teach(model, row, rng, prompts(rng, 200))
    teach(model, row, rng, prompts(rng, 20), PROMPT * factor)
    assert np.median(errors(model, row, PROMPT * factor)) < 0.1


def test_a_slow_drift_is_followed() -> None:
    rng = np.random.default_rng(4)
    model = LinearModel(3)
    row = model.add(PROMPT)
    for step in range(100):
        teach(model, row, rng, prompts(rng, 10), PROMPT * (1 + step / 100))
    assert np.median(errors(model, row, PROMPT * 2)) < 0.06


def test_ten_thousand_equal_observations_neither_wind_up_nor_forget_the_rest() -> None:
    rng = np.random.default_rng(5)
    model = LinearModel(3)
    row = model.add(PROMPT * 10)
    teach(model, row, rng, prompts(rng, 200))
    before = model.predict(np.full(300, row), prompts(np.random.default_rng(99), 300))[1]
    short = np.array([[1.0, 10.0, 0.05]])
    teach(model, row, rng, np.repeat(short, 10_000, axis=0))
    after = model.predict(np.full(300, row), prompts(np.random.default_rng(99), 300))[1]
    assert np.quantile(errors(model, row), 0.95) < 0.06
    assert (after < 2 * before).all()
    other = PROMPT * [1.0, 5.0, 1.0]
    teach(model, row, rng, prompts(rng, 40), other)
    assert np.median(errors(model, row, other)) < 0.1


def test_rows_do_not_touch_each_other() -> None:
    rng = np.random.default_rng(6)
    model = LinearModel(3)
    truths = {model.add(PROMPT): PROMPT * factor for factor in (0.2, 1.0, 7.0)}
    for x in prompts(rng, 100):
        for row, truth in truths.items():
            teach(model, row, rng, x[None], truth)
    for row, truth in truths.items():
        assert np.median(errors(model, row, truth)) < 0.03


def test_a_restarted_worker_keeps_its_shape_and_learns_its_new_speed() -> None:
    rng = np.random.default_rng(7)
    model = LinearModel(3)
    row, rows = model.add(np.array([1.0, 1.0, 1.0])), np.array([0])
    teach(model, row, rng, prompts(rng, 300))
    kept = model.coefficients(rows)
    model.restart(row)
    assert (model.coefficients(rows) == kept).all()
    assert model.counts(rows)[0] == 0 and model.confidence(rows)[0] == 0.0
    teach(model, row, rng, prompts(rng, 3), PROMPT * 2)
    assert np.quantile(errors(model, row, PROMPT * 2), 0.95) < 0.2


def test_a_newcomer_starts_from_its_peers() -> None:
    rng = np.random.default_rng(8)
    model = LinearModel(3)
    rows = np.array([model.add(PROMPT * 10) for _ in range(5)])
    for row in rows[:3]:
        teach(model, row, rng, prompts(rng, 100))
    np.testing.assert_allclose(model.typical(rows), PROMPT, rtol=0.15)
    np.testing.assert_array_equal(model.typical(rows[3:]), PROMPT * 10)
    newcomer = model.add(model.typical(rows))
    assert errors(model, newcomer).max() < 0.15
    assert model.confidence(np.array([newcomer]))[0] == 0.0


def test_a_trusted_prior_gives_way_more_slowly() -> None:
    model = LinearModel(1)
    rows = np.array([model.add(np.array([10.0])), model.add(np.array([10.0]), weight=1e6)])
    for row in rows:
        model.observe(row, np.ones(1), 20.0)
    loose, firm = model.milliseconds(rows, np.ones((2, 1)))
    assert firm < 11.0 < 19.0 < loose


def test_removed_rows_are_reused_without_memory() -> None:
    rng = np.random.default_rng(9)
    model = LinearModel(3)
    row = model.add(PROMPT)
    teach(model, row, rng, prompts(rng, 50))
    model.remove(row)
    assert model.add(PROMPT * 2) == row
    assert model.counts(np.array([row]))[0] == 0
    np.testing.assert_array_equal(model.coefficients(np.array([row]))[0], PROMPT * 2)


def test_thousands_of_rows() -> None:
    rng = np.random.default_rng(10)
    model = LinearModel(3)
    rows = np.array([model.add(PROMPT * factor) for factor in rng.uniform(0.1, 10.0, 4_096)])
    x = prompts(rng, len(rows))
    for row in rows:
        model.observe(row, x[row], float(x[row] @ PROMPT))
    ms, sd = model.predict(rows, x)
    assert len(set(rows.tolist())) == len(rows)
    np.testing.assert_allclose(ms, x @ PROMPT, rtol=0.2)
    assert np.isfinite(sd).all()


@pytest.mark.parametrize("seen", [float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e300])
def test_times_that_cannot_be_teach_nothing(seen: float) -> None:
    model = LinearModel(3)
    row, x = model.add(PROMPT), np.array([1.0, 100.0, 5.0])
    predicted = float(x @ PROMPT)
    assert model.observe(row, x, seen) == pytest.approx(predicted)
    assert model.milliseconds(np.array([row]), x[None])[0] == pytest.approx(predicted)
    assert model.counts(np.array([row]))[0] == 0


ANY = st.floats(allow_nan=True, allow_infinity=True)
SENSIBLE = st.floats(0.0, 1e6)
OBSERVATION = st.tuples(st.lists(SENSIBLE | ANY, min_size=3, max_size=3), SENSIBLE | ANY)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@settings(max_examples=300, deadline=None)
@given(prior=st.lists(SENSIBLE | ANY, min_size=3, max_size=3), observations=st.lists(OBSERVATION, max_size=40))
def test_nothing_makes_it_negative_or_not_a_number(
    prior: list[float], observations: list[tuple[list[float], float]]
) -> None:
    model = LinearModel(3)
    row = model.add(np.array(prior))
    for features, seen in observations:
        assert 0.0 <= model.observe(row, np.array(features), seen) <= LONGEST_MS
    asked = np.array([[1.0, 5.0, 3.0], *(features for features, _ in observations)])
    ms, sd = model.predict(np.full(len(asked), row), asked)
    assert ((ms >= 0.0) & (ms <= LONGEST_MS)).all()
    assert ((sd >= 0.0) & np.isfinite(sd)).all()
    assert (model.coefficients(np.array([row])) >= 0.0).all()
    assert 0.0 <= model.confidence(np.array([row]))[0] <= 1.0


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    constant=st.floats(0.5, 100.0),
    per_token=st.floats(0.01, 10.0),
    quadratic=st.floats(0.0, 0.1),
    scale=st.floats(0.1, 10.0),
)
def test_any_sensible_worker_is_learned(
    seed: int, constant: float, per_token: float, quadratic: float, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    truth = np.array([constant, per_token, quadratic])
    model = LinearModel(3)
    row = model.add(np.maximum(truth, 1e-4) * scale)
    teach(model, row, rng, prompts(rng, 60), truth)
    assert np.median(errors(model, row, truth)) < 0.06


def test_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(11)
    model = LinearModel(3)
    rows, x, times = np.array([model.add(PROMPT) for _ in range(128)]), prompts(rng, 128), 1_000
    started = perf_counter()
    for _ in range(times):
        model.milliseconds(rows, x)
    expected = perf_counter()
    for _ in range(times):
        model.predict(rows, x)
    predicted = perf_counter()
    for i in range(times):
        model.observe(i % 128, x[i % 128], 50.0)
    observed = perf_counter()
    figures = (expected - started, predicted - expected, observed - predicted)
    with capsys.disabled():
        print(
            "\n128 rows: milliseconds {:.1f} us, predict {:.1f} us; observe {:.1f} us".format(
                *(f * 1e3 for f in figures)
            )
        )
