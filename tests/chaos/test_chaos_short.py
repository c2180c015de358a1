"""Half a minute of chaos on simulated engines; `run.py` is the same for as long as asked."""

from pathlib import Path

import pytest
from run import Scenario, chaos

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]


async def test_answers_stay_right_and_nothing_leaks(tmp_path: Path) -> None:
    report = await chaos(Scenario(seconds=30, gap_s=2.0, clients=6, questions=12), tmp_path)
    print(f"\n{report}")
    assert not report["defects"]
    assert not report["leaks"]
    assert report["requests"] > 30
    assert report["outcomes"]["complete"] > 0.6 * report["requests"]
