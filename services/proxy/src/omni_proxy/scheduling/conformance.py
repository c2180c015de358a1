"""What every plug-in has to hold to, whoever wrote it: functions that raise `AssertionError` and say what is wrong.

    from omni_proxy.scheduling.conformance import check_policy

    def test_conforms():
        check_policy(lambda: MyPolicy(MyParameters()))

Each makes its plug-in several times, shows it random fleets from a fixed seed, and tries it on what is rare in a test
and common in a cluster: nobody there, everybody excluded, workers that cannot pair, two sizes of fleet, many sessions.
"""

import gc
import json
import math
import random
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, TypeVar

import numpy as np

from omni_common.errors import Unavailable
from omni_proxy.flow.orders import Order
from omni_proxy.flow.ticket import Ticket
from omni_proxy.scheduling.decision import Decision, LegCosts, eligible
from omni_proxy.scheduling.interfaces import Filter, Observer, Policy, Scorer
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.samples import Sample, frozen, large_sample, marks_of, no_workers, samples
from omni_proxy.scheduling.view import FleetView, Rows

_SAMPLES = 200
_SIZES = (64, 512)
_MOST_GROWTH = 3 * _SIZES[1] / _SIZES[0]
"""In time, from the small fleet to the large one: linear with room for noise; a quadratic step makes it 64."""
_TIMED_CALLS, _TIMED_ROUNDS, _TIMED_TRIES = 5, 5, 4
_SESSIONS = 1500
_MOST_BYTES_PER_CALL = 32
"""That may stay allocated after a call for a session not seen before. A table of sessions keeps over 100."""

T = TypeVar("T")


def check_policy(make: Callable[[], Policy], seed: int = 0) -> None:
    """Raises AssertionError: what the policy does wrong."""
    policy = make()
    _refuses_an_empty_fleet(policy)
    chosen = [_checked_choice(policy, sample) for sample in samples(seed, _SAMPLES)]
    again = make()
    for sample, first in zip(samples(seed, _SAMPLES), chosen, strict=True):
        second = _choice_of(again, sample)
        if _key(first) != _key(second):
            _fail(f"two policies made alike chose {_key(first)} and {_key(second)} for the same requests in a row")
    _grows_linearly(make, lambda one, sample: one.choose(sample.request, sample.view))
    _keeps_little(make, lambda one, sample: one.choose(sample.request, sample.view))


def check_filter(make: Callable[[], Filter], seed: int = 0) -> None:
    """Raises AssertionError: what the filter does wrong."""

    def keep(one: Filter, sample: Sample) -> Any:
        return one.keep(sample.request, sample.view)

    def check(kept: Any, sample: Sample) -> None:
        if not isinstance(kept, np.ndarray) or kept.dtype != np.bool_ or kept.shape != (len(sample.view),):
            _fail(f"keep() returned {_shape(kept)} for {len(sample.view)} workers, not one bool for each")

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
            _fail(f"score() returned {_shape(scores)} for {len(sample.view)} workers, not one float for each")
        if not ((scores >= 0) & (scores <= 1)).all():
            wrong = scores[~((scores >= 0) & (scores <= 1))][0]
            _fail(f"a score of {wrong} is not in [0, 1]")

    _check_columns(make, score, check, seed)


def check_order(order: Order, seed: int = 0) -> None:
    """Raises AssertionError: what the order does wrong."""
    draw = random.Random(seed)
    lengths = set()
    for ticket in (_ticket(draw) for _ in range(_SAMPLES)):
        key, again = (_guarded(partial(order.key, ticket)) for _ in range(2))
        if not isinstance(key, tuple) or not all(isinstance(part, int | float) for part in key):
            _fail(f"key() returned {key!r}, not a tuple of numbers")
        if any(math.isnan(part) for part in key):
            _fail("key() holds NaN, which has no place among numbers")
        if key != again:
            _fail(f"key() gave {key} and then {again} for one ticket; a key is fixed when the request comes")
        lengths.add(len(key))
        if order.hopeless_from_s is not None:
            instant = _guarded(partial(order.hopeless_from_s, ticket))
            if not isinstance(instant, int | float) or math.isnan(instant):
                _fail(f"hopeless_from_s() returned {instant!r}, not an instant")
    if len(lengths) > 1:
        _fail(f"keys of {sorted(lengths)} numbers: those of one order have one length")


def check_decision(request: SchedulingRequest, view: FleetView, decision: Decision) -> None:
    """Raises AssertionError: what a policy may not have decided for that request on that fleet."""
    prefills, decodes = eligible(request, view)
    if decision.ids != view.ids:
        _fail("the decision's ids are not the view's")
    decode = _row(view, "decode", decision.decode, decodes, request)
    prefill = None
    if decision.prefill is not None:
        prefill = _row(view, "prefill", decision.prefill, prefills, request)
        if prefill == decode:
            _fail(f"{decision.decode} was chosen for both legs; without a prefill leg it computes the prompt itself")
        if not view.can_pair(np.array([prefill]), np.array([decode])).all():
            _fail(f"{decision.prefill} and {decision.decode} cannot pair")
    uncached = max(request.prompt_tokens - int(view.cached_tokens[decode if prefill is None else prefill]), 0)
    if decision.uncached_tokens != uncached:
        _fail(f"uncached_tokens is {decision.uncached_tokens}, the worker that computes the prompt lacks {uncached}")
    if not decision.policy:
        _fail("the decision does not name its policy")
    _check_costs("prefill_costs", decision.prefill_costs, prefills, prefill)
    _check_costs("decode_costs", decision.decode_costs, decodes, None if prefill is None else decode)
    _check_costs("alone_costs", decision.alone_costs, decodes, None)
    stated = [costs for costs in (decision.decode_costs, decision.alone_costs) if decode in costs.rows]
    if not stated:
        _fail(f"no cost is stated for {decision.decode}, which was chosen to decode")
    if not any(np.isfinite(costs.value[costs.rows == decode]).all() for costs in stated):
        _fail(f"the cost of {decision.decode}, which was chosen, is infinite")
    json.dumps(decision.explained(), allow_nan=True)


def _check_columns(
    make: Callable[[], T], call: Callable[[T, Sample], Any], check: Callable[[Any, Sample], None], seed: int
) -> None:
    one, other = make(), make()
    for sample in (no_workers(), *samples(seed, _SAMPLES)):
        column = _unharmed(sample, partial(call, one, sample))
        check(column, sample)
        again = _guarded(partial(call, other, sample))
        if not np.array_equal(column, again):
            _fail("two made alike answered differently for the same requests in a row")
    _grows_linearly(make, call)
    _keeps_little(make, call)


def _refuses_an_empty_fleet(policy: Policy) -> None:
    sample = no_workers()
    try:
        policy.choose(sample.request, sample.view)
    except Unavailable:
        return
    except Exception as error:
        _fail(f"raised {type(error).__name__} on an empty fleet, not Unavailable: {error}")
    _fail("chose a worker of an empty fleet")


def _choice_of(policy: Policy, sample: Sample) -> Decision | None:
    """None where it refused."""
    try:
        return policy.choose(sample.request, sample.view)
    except Unavailable:
        return None


def _checked_choice(policy: Policy, sample: Sample) -> Decision | None:
    decision = _unharmed(sample, partial(_choice_of, policy, sample))
    can_decode = sample.can_decode
    if decision is None and can_decode:
        _fail("raised Unavailable though a decode worker takes work")
    if decision is not None and not can_decode:
        _fail(f"chose {decision.decode} though no decode worker takes work")
    if decision is not None:
        check_decision(sample.request, sample.view, decision)
    return decision


def _row(view: FleetView, leg: str, worker: str, allowed: Rows, request: SchedulingRequest) -> int:
    if worker not in view.ids:
        _fail(f"{worker!r} was chosen for {leg} and is not in the view")
    row = view.ids.index(worker)
    if row not in allowed:
        _fail(f"{worker} was chosen for {leg}{_why_not(view, leg, row, request)}")
    return row


def _why_not(view: FleetView, leg: str, row: int, request: SchedulingRequest) -> str:
    if view.ids[row] in request.excluded:
        return " and is excluded"
    if not (view.prefills if leg == "prefill" else view.decodes)[row]:
        return ", which it does not do"
    if leg == "prefill":
        return ", but the request may not be prefilled apart"
    return " and cannot pull the blocks that wait, while others can"


def _check_costs(name: str, costs: LegCosts, allowed: Rows, chosen: int | None) -> None:
    rows = [int(row) for row in costs.rows]
    if len(set(rows)) < len(rows) or not set(rows) <= {int(row) for row in allowed}:
        _fail(f"{name} has rows that are not candidates, or has one twice")
    for term, column in (("value", costs.value), *costs.terms.items()):
        if len(column) != len(rows):
            _fail(f"{name}: {term} has {len(column)} entries for {len(rows)} workers")
        if np.isnan(column).any():
            _fail(f"{name}: {term} is NaN for a worker")
    if chosen is not None and not (chosen in rows and np.isfinite(costs.value[rows.index(chosen)])):
        _fail(f"{name} states no finite cost for the worker that was chosen")


def _key(decision: Decision | None) -> tuple[str | None, str] | None:
    return None if decision is None else (decision.prefill, decision.decode)


def _any_decision(sample: Sample) -> Decision | None:
    from omni_proxy.scheduling.policies import POLICIES

    return _choice_of(POLICIES["least_loaded"].build("least_loaded"), sample)


def _unharmed(sample: Sample, call: Callable[[], T]) -> T:
    """The call's answer, after a look at what it did to the view."""
    frozen(sample.view)
    before = marks_of(sample.view)
    answer = _guarded(call)
    if marks_of(sample.view) != before:
        _fail("wrote to the view, which is everybody's")
    return answer


def _guarded(call: Callable[[], T]) -> T:
    try:
        return call()
    except Exception as error:
        wrote = "read-only" in str(error) or "does not support item assignment" in str(error)
        what = "wrote to the view, which is everybody's" if wrote else "raised what it may not"
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def _grows_linearly(make: Callable[[], T], call: Callable[[T, Sample], Any]) -> None:
    """Tries again when it looks otherwise: noise passes, a quadratic step does not."""
    small, large = (large_sample(size) for size in _SIZES)
    growth = math.inf
    for _ in range(_TIMED_TRIES):
        growth = min(growth, _least_time_s(make(), call, large) / _least_time_s(make(), call, small))
        if growth <= _MOST_GROWTH:
            return
    _fail(f"{_SIZES[1]} workers take {growth:.0f} times as long as {_SIZES[0]}: a step is not linear in the fleet")


def _least_time_s(one: T, call: Callable[[T, Sample], Any], sample: Sample) -> float:
    call(one, sample)
    least = math.inf
    for _ in range(_TIMED_ROUNDS):
        start_s = time.thread_time()
        for _ in range(_TIMED_CALLS):
            call(one, sample)
        least = min(least, time.thread_time() - start_s)
    return max(least, 1e-6)


def _keeps_little(make: Callable[[], T], call: Callable[[T, Sample], Any]) -> None:
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
        _fail(f"{_SESSIONS} new sessions left {kept_bytes} bytes behind: its state is not bounded")


def _ticket(draw: random.Random) -> Ticket:
    arrived_s = draw.uniform(0, 1000)
    return Ticket(
        request_id=f"r{draw.randrange(100)}",
        arrived_s=arrived_s,
        deadline_s=draw.choice([math.inf, arrived_s + draw.uniform(0, 600)]),
        tenant=draw.choice(["", "a", "b"]),
        priority=draw.choice([-10, 0, 10]),
        prompt_tokens=draw.choice([0, 1, 100, 100_000]),
        uncached_tokens=draw.choice([0, 1, 100]),
        output_tokens=draw.choice([0, 1, 1000]),
        ttft_slo_ms=draw.choice([None, 0.0, 500.0]),
        prefill_ms=draw.choice([0.0, 10.0, 1e4]),
    )


def _shape(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def _fail(message: str) -> NoReturn:
    raise AssertionError(message)
