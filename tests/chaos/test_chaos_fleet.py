"""A hundred simulated workers that die, stop, slow down and lose what they say, in virtual time and from a seed."""

import pytest
import virtual_loop
from fleet import Result, Scenario, chaos

pytestmark = pytest.mark.timeout(180)


def errors(result: Result) -> int:
    return sum(count for outcome, count in result.outcomes.items() if outcome.startswith("error"))


def test_answers_stay_right_and_nothing_leaks() -> None:
    result = virtual_loop.run(chaos(Scenario(seconds=20)))
    print(f"\n{result}")
    assert not [outcome for outcome in result.outcomes if outcome.startswith("defect")]
    assert not result.leaks
    assert set(result.faults) == {"die", "stop", "slow", "pulls", "prefills", "break", "events"}
    assert result.outcomes["complete"] > 1000
    assert result.resumes > 10
    assert errors(result) == 0


def test_a_seed_tells_everything() -> None:
    scenario = Scenario(workers=20, seconds=5, seed=11)
    assert virtual_loop.run(chaos(scenario)) == virtual_loop.run(chaos(scenario))


def test_abandoned_requests_leave_nothing() -> None:
    """Five hundred and more clients that leave at random moments, and hardly one that stays."""
    result = virtual_loop.run(chaos(Scenario(workers=8, seconds=10, rate=60, fault_rate=0.5, abandoned=0.95)))
    print(f"\n{result}")
    assert result.outcomes["abandoned"] > 400
    assert not result.leaks
    assert not [outcome for outcome in result.outcomes if outcome.startswith("defect")]
