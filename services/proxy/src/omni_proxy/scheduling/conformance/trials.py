"""What all checks share: calls that may not raise, time and its growth, growth of state."""

import gc
import math
import time
import tracemalloc
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import numpy as np

from omni_proxy.scheduling.policies import POLICIES
from omni_proxy.scheduling.samples import Sample, frozen, large_sample, marks_of

SAMPLES = 200
_SIZES = (64, 512)
_MOST_GROWTH = 2 * _SIZES[1] / _SIZES[0]
"""In time, from the small fleet to the large one: linear with room for noise; a quadratic step makes it 64."""
_CALLS = (16, 2)
_ROUNDS, _FEWEST_TRIES, _MOST_TRIES = 5, 2, 6
_MOST_CHOICES, _TURNS = 30, 20
"""A call may take as long as so many choices by `cost`. What is shipped takes up to 5, all scorers together 10."""
_SESSIONS = 800
_MOST_BYTES_PER_CALL = 32
"""That may stay allocated after a call for a session not seen before. A table of sessions keeps over 100."""

T = TypeVar("T")


def fail(message: str) -> NoReturn:
    raise AssertionError(message)


def shape(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def guarded(call: Callable[[], T]) -> T:
    try:
        return call()
    except Exception as error:
        wrote = "read-only" in str(error) or "does not support item assignment" in str(error)
        what = "wrote to the view, which is everybody's" if wrote else "raised what it may not"
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def unharmed(sample: Sample, call: Callable[[], T]) -> T:
    """The call's answer, after a look at what it did to the view."""
    frozen(sample.view)
    before = marks_of(sample.view)
    answer = guarded(call)
    if marks_of(sample.view) != before:
        fail("wrote to the view, which is everybody's")
    return answer


def takes_little(make: Callable[[], T], call: Callable[[T, Sample], Any]) -> None:
    """Nobody's tokens go out meanwhile, so waiting counts too: the time of single calls by the clock.

    Those of `cost` are taken in turns with it, and of each the least counts: a slow machine slows both, and a busy one
    would have to interrupt every call.
    """
    one, cost, sample = make(), POLICIES["cost"].build("cost"), large_sample(_SIZES[0])
    least_s = cost_s = math.inf
    for _ in range(_TURNS):
        least_s = min(least_s, _clocked_s(lambda: call(one, sample)))
        cost_s = min(cost_s, _clocked_s(lambda: cost.choose(sample.request, sample.view)))
    if least_s > _MOST_CHOICES * cost_s:
        times = f"{least_s / cost_s:.0f} times as long as the policy cost, more than {_MOST_CHOICES}"
        fail(f"a call takes {least_s * 1e3:.1f} ms for {_SIZES[0]} workers, {times}: no token goes out meanwhile")


def _clocked_s(call: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def grows_linearly(make: Callable[[], T], call: Callable[[T, Sample], Any]) -> None:
    """Compares the least times of several tries: another process may slow one down, none speeds one up."""
    least_s = [math.inf, math.inf]
    for tries in range(1, _MOST_TRIES + 1):
        for side, (size, calls) in enumerate(zip(_SIZES, _CALLS, strict=True)):
            least_s[side] = min(least_s[side], _least_time_s(make(), call, large_sample(size), calls))
        growth = least_s[1] / least_s[0]
        if growth <= _MOST_GROWTH and tries >= _FEWEST_TRIES:
            return
    fail(f"{_SIZES[1]} workers take {growth:.0f} times as long as {_SIZES[0]}: a step is not linear in the fleet")


def _least_time_s(one: T, call: Callable[[T, Sample], Any], sample: Sample, calls: int) -> float:
    """Processor time of one call."""
    call(one, sample)
    least_s = math.inf
    for _ in range(_ROUNDS):
        start_s = time.thread_time()
        for _ in range(calls):
            call(one, sample)
        least_s = min(least_s, (time.thread_time() - start_s) / calls)
    return max(least_s, 1e-7)


def keeps_little(make: Callable[[], T], call: Callable[[T, Sample], Any]) -> None:
    """State may not grow with the sessions, tenants and adapters ever seen."""
    one, sample = make(), large_sample(8)
    for number in range(_SESSIONS):
        call(one, sample.of_session(number))
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(_SESSIONS, 2 * _SESSIONS):
            call(one, sample.of_session(number))
        gc.collect()
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    if kept_bytes > _MOST_BYTES_PER_CALL * _SESSIONS:
        fail(f"{_SESSIONS} new sessions left {kept_bytes} bytes behind: its state is not bounded")
