"""When a worker that owes tokens counts as stuck."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_proxy.health import HealthSettings
from omni_proxy.stalls import TICK_S, StallWatch

SETTINGS = HealthSettings(stall_min_s=3.0, silence_s=2.5, alive_factor=4.0, alive_min_s=20.0, stall_factor=20.0)


def ticks_until_stuck(watch: StallWatch, step_s: float, *, reports: bool) -> float | None:
    """Seconds; None if not within two minutes."""
    for tick in range(1, int(120 / TICK_S)):
        if reports:
            watch.reported()
        if watch.tick(True, step_s):
            return tick * TICK_S
    return None


@pytest.mark.parametrize(
    ("step_s", "reports", "stuck_after_s"),
    [(0.01, False, 3.0), (0.01, True, 20.0), (0.5, False, 10.0), (0.5, True, 40.0)],
)
def test_late_is_a_multiple_of_what_was_foreseen(step_s, reports, stuck_after_s):
    assert ticks_until_stuck(StallWatch(lambda: SETTINGS), step_s, reports=reports) == stuck_after_s


def test_a_long_prompt_has_its_own_time():
    watch = StallWatch(lambda: SETTINGS)
    watch.owes(1.0)
    assert ticks_until_stuck(watch, 0.01, reports=False) == 20.0


@pytest.mark.parametrize(("reports", "stuck_after_s"), [(False, 3.0), (True, 20.0)])
def test_who_is_sent_ever_more_is_not_waited_for_any_longer(reports, stuck_after_s):
    watch = StallWatch(lambda: SETTINGS)
    for tick in range(1, int(stuck_after_s / TICK_S) + 1):
        watch.owes(0.01)
        if reports:
            watch.reported()
        assert watch.tick(True, 0.01) == (tick * TICK_S == stuck_after_s)


def test_who_owes_nothing_is_never_stuck():
    watch = StallWatch(lambda: SETTINGS)
    assert not any(watch.tick(False, 0.01) for _ in range(1000))
    assert watch.is_silent
    assert ticks_until_stuck(watch, 0.01, reports=False) == 3.0


@given(st.floats(0.01, 2.9), st.lists(st.floats(0, 2), max_size=5))
def test_tokens_that_keep_coming_keep_it_well(gap_s, predicted):
    watch = StallWatch(lambda: SETTINGS)
    for predicted_s in predicted:
        watch.owes(predicted_s)
    since_s = 0.0
    for _ in range(400):
        since_s += TICK_S
        if since_s + TICK_S > gap_s:
            watch.came()
            since_s = 0.0
        assert not watch.tick(True, 0.01)
