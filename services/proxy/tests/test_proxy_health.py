"""Circuit breakers of workers: when they open, how they return, and what they may never do; hedges and their budget."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_common.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from omni_proxy.attempt import outcome_of
from omni_proxy.health import Cause, Health, HealthSettings, Outcome, State
from omni_proxy.hedging import Hedging, HedgingSettings

GAP_S = 0.1


def health_of(workers: int, **settings: float) -> Health:
    health = Health(HealthSettings.model_validate(settings))
    for number in range(workers):
        health.join(f"w{number}", ["decode"])
    return health


def fail(health: Health, worker: str, times: int, now: float) -> float:
    for _ in range(times):
        now += GAP_S
        health.began(worker, now)
        health.outcome(worker, Outcome.FAILURE, now)
    return now


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Unavailable("away", reason="session_broken"), Outcome.FAILURE),
        (Internal("broken"), Outcome.FAILURE),
        (Unavailable("draining", reason="rejected"), Outcome.REFUSAL),
        (ResourceExhausted("full"), Outcome.REFUSAL),
        (FailedPrecondition("other model"), Outcome.REFUSAL),
        (InvalidRequest("too long"), Outcome.CLIENT),
        (NotFound("no model"), Outcome.CLIENT),
        (DeadlineExceeded("over"), Outcome.CLIENT),
        (Cancelled("gone"), Outcome.CLIENT),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_are_somebodys_fault(error, kind):
    assert outcome_of(error) is kind


def test_failures_in_a_row_open_and_time_half_opens():
    health = health_of(3)
    now = fail(health, "w0", 2, 0.0)
    assert health.refusal("w0", now) is None
    now = fail(health, "w0", 1, now)
    assert health.refusal("w0", now) == "ejected: consecutive_failures"
    assert health.state("w0", now + 1.0) is State.HALF_OPEN


def test_one_request_probes_and_each_success_admits_one_more():
    health = health_of(3)
    now = fail(health, "w0", 3, 0.0) + 1.0
    for running in range(1, 5):
        for _ in range(running):
            assert health.refusal("w0", now) is None
            health.began("w0", now)
        assert health.refusal("w0", now) == "ejected: probing"
        for _ in range(running - 1):
            health.outcome("w0", Outcome.CLIENT, now)
        health.outcome("w0", Outcome.SUCCESS, now)
    assert health.state("w0", now) is State.CLOSED


def test_a_failed_probe_doubles_the_time_out():
    health = health_of(3)
    now = fail(health, "w0", 3, 0.0)
    for seconds in (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0):
        assert health.state("w0", now + seconds - 0.01) is State.OPEN
        now += seconds
        assert health.refusal("w0", now) is None
        health.began("w0", now)
        health.outcome("w0", Outcome.FAILURE, now)


def test_a_probe_that_never_ends_is_forgotten():
    health = health_of(3)
    now = fail(health, "w0", 3, 0.0) + 1.0
    health.began("w0", now)
    assert health.refusal("w0", now + 29) == "ejected: probing"
    assert health.refusal("w0", now + 31) is None


def test_one_broken_connection_is_one_failure():
    health = health_of(3)
    for _ in range(100):
        health.outcome("w0", Outcome.FAILURE, 1.0)
    assert health.refusal("w0", 1.0) is None


def test_a_failing_share_opens_without_failures_in_a_row():
    health = health_of(3)
    now = 0.0
    while health.refusal("w0", now) is None:
        now = fail(health, "w0", 2, now)
        health.outcome("w0", Outcome.SUCCESS, now)
        assert now < 10
    assert health.refusal("w0", now) == "ejected: failure_ratio"


def test_silence_opens_at_once_and_a_deaf_worker_stays_out():
    health = health_of(3)
    health.silence("w0", 0.0)
    assert health.refusal("w0", 0.9) == "ejected: silent"
    assert health.is_due("w0", 0.5)
    assert not health.is_due("w1", 0.5)
    health.probed("w0", False, 0.9)
    assert health.refusal("w0", 1.5) == "ejected: silent"
    health.probed("w0", True, 1.8)
    assert health.refusal("w0", 1.9) is None


def test_the_last_one_is_never_out():
    health = health_of(1)
    assert health.refusal("w0", fail(health, "w0", 50, 0.0)) is None


def test_those_who_are_out_return_when_the_others_leave():
    health = health_of(3)
    now = fail(health, "w0", 3, 0.0)
    assert health.refusal("w0", now) is not None
    health.away("w1")
    assert health.refusal("w0", now) is not None
    health.away("w2")
    assert health.refusal("w0", now) is None
    health.join("w2", ["decode"])
    assert health.refusal("w0", now) is not None


def test_a_new_process_has_no_past():
    health = health_of(3)
    now = fail(health, "w0", 3, 0.0)
    health.forget("w0")
    health.join("w0", ["decode"])
    assert health.refusal("w0", now) is None
    assert health.counts(now) == {State.CLOSED: 3, State.OPEN: 0, State.HALF_OPEN: 0}


def test_a_worker_of_both_legs_counts_in_both():
    spared: list[Cause] = []
    health = Health(HealthSettings(), on_spared=spared.append)
    health.join("p", ["prefill"])
    health.join("b", ["prefill", "decode"])
    assert health.refusal("b", fail(health, "b", 3, 0.0)) is None
    assert spared == [Cause.CONSECUTIVE]
    health.join("d", ["decode"])
    assert health.refusal("b", fail(health, "b", 1, 1.0)) is not None


@pytest.mark.parametrize(
    ("waited_s", "predicted_s", "silent_s", "is_stuck"),
    [
        (2.9, 0.01, 10.0, False),
        (3.0, 0.01, 10.0, True),
        (3.0, 0.01, 1.0, False),
        (59.0, 0.01, 1.0, False),
        (60.0, 0.01, 1.0, True),
        (79.0, 1.0, 1.0, False),
        (80.0, 1.0, 1.0, True),
        (19.0, 1.0, 10.0, False),
        (20.0, 1.0, 10.0, True),
        (60.0, 100.0, 10.0, True),
    ],
)
def test_stuck_is_late_and_silent(waited_s, predicted_s, silent_s, is_stuck):
    assert HealthSettings().is_stuck(waited_s, predicted_s, silent_s) is is_stuck


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["w0", "w1", "w2", "w3", "w4"]),
        st.sampled_from(["success", "failure", "failure", "failure", "silence", "began", "away", "join", "client"]),
        st.floats(0, 3),
    ),
    max_size=120,
)


@given(EVENTS, st.floats(0, 1))
def test_most_stay_in_and_never_all_are_out(events, ratio):
    health = health_of(5, max_ejected_ratio=ratio)
    here, now = {f"w{i}" for i in range(5)}, 0.0
    for worker, event, gap in events:
        now += gap
        match event:
            case "silence":
                health.silence(worker, now)
            case "began":
                health.began(worker, now)
            case "away":
                health.away(worker)
                here.discard(worker)
            case "join":
                health.join(worker, ["decode"])
                here.add(worker)
            case _:
                health.outcome(worker, Outcome(event), now)
        out = [w for w in here if health.refusal(w, now) is not None]
        assert len(out) <= len(here) * ratio
        assert not here or len(out) < len(here)
        assert sum(health.counts(now).values()) == len(here)


@given(EVENTS)
def test_whatever_happened_a_worker_that_is_well_returns(events):
    health, now = health_of(5), 0.0
    for worker, event, gap in events:
        now += gap
        if event == "silence":
            health.silence(worker, now)
        elif event in ("success", "failure"):
            health.outcome(worker, Outcome(event), now)
    for _ in range(200):
        now += 1.0
        for worker in ("w0", "w1", "w2", "w3", "w4"):
            if health.refusal(worker, now) is None:
                health.began(worker, now)
                health.outcome(worker, Outcome.SUCCESS, now)
    assert health.counts(now)[State.CLOSED] == 5


@given(st.floats(0.06, 5), st.integers(1, 3))
def test_alternate_success_and_failure_do_not_flap(gap_s, successes):
    ejections: Counter[str] = Counter()
    health = Health(HealthSettings(), on_ejected=lambda cause: ejections.update([cause]))
    for number in range(3):
        health.join(f"w{number}", ["decode"])
    now = 0.0
    for _ in range(200):
        now += gap_s
        health.outcome("w0", Outcome.FAILURE, now)
        for _ in range(successes):
            now += gap_s
            health.outcome("w0", Outcome.SUCCESS, now)
    assert not ejections


def test_hedging_is_off_unless_asked_for():
    assert Hedging(HedgingSettings()).patience_ms(100) is None


def test_the_budget_bounds_hedges_to_a_share_of_prefills():
    hedging = Hedging(HedgingSettings(enabled=True, budget_ratio=0.1, budget_burst=2))
    hedges = 0
    for _ in range(1000):
        assert hedging.patience_ms(100) is not None
        hedges += hedging.take()
    assert 98 <= hedges <= 102
    assert not hedging.take()
    hedging.give_back()
    assert hedging.take()


def test_hedging_that_is_switched_on_later_begins_with_the_ratio_it_is_given():
    hedging = Hedging(HedgingSettings())
    hedging.settings = HedgingSettings(enabled=True, first_ratio=5)
    assert hedging.patience_ms(100) == 500


def test_patience_is_the_quantile_of_what_was_seen():
    hedging = Hedging(HedgingSettings(enabled=True, quantile=0.9, min_wait_ms=10))
    assert hedging.patience_ms(100) == 300
    for number in range(320):
        hedging.seen(100, 100 + number % 10 * 10)
    assert hedging.patience_ms(100) == pytest.approx(181, abs=10)
    assert hedging.patience_ms(1) == 10
