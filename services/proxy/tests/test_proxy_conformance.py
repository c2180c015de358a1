"""Everything shipped conforms, and what does not is found out."""

import time
from dataclasses import replace

import numpy as np
import pytest

from omni_common.errors import FailedPrecondition, Unavailable
from omni_proxy.flow.orders import ORDERS, Order
from omni_proxy.scheduling import conformance
from omni_proxy.scheduling.decision import Reason, eligible
from omni_proxy.scheduling.filters import FILTERS
from omni_proxy.scheduling.policies import POLICIES, policy_of
from omni_proxy.scheduling.predictors import PREDICTORS, Fixed
from omni_proxy.scheduling.scorers import SCORERS
from omni_proxy.scheduling.view import Pairing

REQUIRED = {"role": {"role": "decode"}}
FILTER_PARAMETERS = {
    "selector": {"match_labels": {"omni.zone": "z0"}},
    "utilization": {"max_running": 8, "max_kv_usage": 0.5, "max_stats_age_s": 1},
    "length_range": {"bounds": [500, 5000]},
    **REQUIRED,
}


@pytest.mark.parametrize("name", POLICIES)
def test_policies_conform(name):
    conformance.check_policy(lambda: POLICIES[name].build(name))


def test_a_filtered_policy_conforms():
    used = [{"filter": name, "parameters": FILTER_PARAMETERS.get(name, {})} for name in FILTERS]
    conformance.check_policy(lambda: policy_of("least_loaded", filters=used))


@pytest.mark.parametrize("name", FILTERS)
def test_filters_conform(name):
    conformance.check_filter(lambda: FILTERS[name].build(name, FILTER_PARAMETERS.get(name)))


@pytest.mark.parametrize("name", SCORERS)
def test_scorers_conform(name):
    conformance.check_scorer(lambda: SCORERS[name].build(name))


@pytest.mark.parametrize("name", ORDERS)
def test_orders_conform(name):
    conformance.check_order(ORDERS[name])


@pytest.mark.parametrize("name", PREDICTORS)
def test_predictors_conform(name):
    conformance.check_predictor(PREDICTORS[name].build(name))


class Sound:
    """A policy that conforms; the broken ones are this with one thing wrong."""

    def __init__(self):
        self._policy = policy_of("least_uncached_tokens")

    def choose(self, request, view):
        return self._policy.choose(request, view)


class WritesToTheView(Sound):
    def choose(self, request, view):
        decision = super().choose(request, view)
        view.own_requests[view.ids.index(decision.decode)] += 1
        return decision


class WritesWithForce(Sound):
    def choose(self, request, view):
        decision = super().choose(request, view)
        view.dispatched.flags.writeable = True
        dispatched = view.dispatched
        dispatched += 1
        return decision


class WritesToLabels(Sound):
    def choose(self, request, view):
        decision = super().choose(request, view)
        view.labels[0]["mine"] = "yes"
        return decision


class TakesTheExcluded(Sound):
    def choose(self, request, view):
        return super().choose(replace(request, excluded=frozenset()), view)


class DecodesAnywhere(Sound):
    def choose(self, request, view):
        decision = super().choose(request, view)
        others = [worker for worker, decodes in zip(view.ids, view.decodes, strict=True) if not decodes]
        return replace(decision, decode=next((w for w in others if w not in request.excluded), decision.decode))


class PairsAnyhow(Sound):
    def choose(self, request, view):
        anyhow = replace(view, pairing=Pairing(["c"] * len(view), [""] * len(view)))
        return super().choose(replace(request, kv_connector=None), anyhow)


class PairsWithItself(Sound):
    def choose(self, request, view):
        decision = super().choose(request, view)
        row = view.ids.index(decision.decode)
        if row not in eligible(request, view)[0]:
            return decision
        return replace(decision, prefill=decision.decode, reason=Reason.DISAGGREGATED)


class PrefillsWhatMayNotBe(Sound):
    def choose(self, request, view):
        return super().choose(replace(request, may_prefill=True), view)


class LeavesBlocksBehind(Sound):
    def choose(self, request, view):
        return super().choose(replace(request, kv_connector=None), view)


class Names(Sound):
    def choose(self, request, view):
        return replace(super().choose(request, view), decode="somebody")


class Miscounts(Sound):
    def choose(self, request, view):
        return replace(super().choose(request, view), uncached_tokens=-1)


class TakesGoingOnForAPrompt(Sound):
    def choose(self, request, view):
        decision = super().choose(request, view)
        return decision if request.may_prefill else replace(decision, reason=Reason.NO_PREFILL)


class CallsAPairAlone(Sound):
    def choose(self, request, view):
        decision = super().choose(request, view)
        return replace(decision, reason=Reason.SHORT) if decision.prefill else decision


class CostsNothingKnown(Sound):
    def choose(self, request, view):
        decision = super().choose(request, view)
        costs = decision.decode_costs
        return replace(decision, decode_costs=replace(costs, value=costs.value * np.nan))


class HidesCosts(Sound):
    def choose(self, request, view):
        decision = super().choose(request, view)
        none = replace(decision.decode_costs, rows=decision.decode_costs.rows[:0], value=np.zeros(0), terms={})
        return replace(decision, decode_costs=none, alone_costs=none)


class Draws(Sound):
    def choose(self, request, view):
        rng = np.random.default_rng()
        return super().choose(request, replace(view, own_requests=rng.integers(0, 99, len(view))))


class Reads(Sound):
    """Fails on an empty fleet."""

    def choose(self, request, view):
        view.kv_usage.max()
        return super().choose(request, view)


class Refuses(Sound):
    def choose(self, request, view):
        if request.prompt_tokens > 1000:
            raise Unavailable("too long", retry_after_s=1.0)
        return super().choose(request, view)


class Raises(Sound):
    def choose(self, request, view):
        if request.adapter == "z":
            raise FailedPrecondition("no such adapter")
        return super().choose(request, view)


class ComparesAllWithAll(Sound):
    def choose(self, request, view):
        sum(a == b for a in view.ids for b in view.ids)
        return super().choose(request, view)


class AsksElsewhere(Sound):
    """Waits for an answer that uses none of this process's time."""

    def choose(self, request, view):
        time.sleep(0.05 if len(view) == 64 else 0)
        return super().choose(request, view)


class RemembersEverybody(Sound):
    def __init__(self):
        super().__init__()
        self._homes = {}

    def choose(self, request, view):
        decision = super().choose(request, view)
        self._homes[request.session] = decision.decode
        return decision


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (WritesToTheView, "wrote to the view"),
        (WritesWithForce, "wrote to the view"),
        (WritesToLabels, "wrote to the view"),
        (TakesTheExcluded, "and is excluded|rows that are not candidates"),
        (DecodesAnywhere, "was chosen for decode, which it does not do"),
        (PairsAnyhow, "cannot pair|cannot pull"),
        (PairsWithItself, "was chosen for both legs"),
        (PrefillsWhatMayNotBe, "may not be prefilled apart"),
        (LeavesBlocksBehind, "cannot pull the blocks that wait|rows that are not candidates"),
        (Names, "'somebody' was chosen for decode and is not in the view"),
        (Miscounts, "uncached_tokens is -1, the worker that computes the prompt lacks"),
        (TakesGoingOnForAPrompt, "the reason is no_prefill_worker for a request that goes on"),
        (CallsAPairAlone, "the reason is uncached_part_short and prefill is"),
        (CostsNothingKnown, "decode_costs: value is NaN"),
        (HidesCosts, "states no finite cost|no cost is stated"),
        (Draws, "two policies made alike chose"),
        (Reads, "raised ValueError on an empty fleet, not Unavailable"),
        (Refuses, "raised Unavailable though a decode worker takes work"),
        (Raises, "raised what it may not: FailedPrecondition"),
        (ComparesAllWithAll, "a step is not linear in the fleet"),
        (AsksElsewhere, "times as long as the policy cost, more than 30"),
        (RemembersEverybody, "its state is not bounded"),
    ],
)
def test_a_broken_policy_is_found_out(broken, message):
    with pytest.raises(AssertionError, match=message):
        conformance.check_policy(broken)


def test_the_sound_one_it_is_made_from_conforms():
    conformance.check_policy(Sound)


class Columns:
    """A filter and a scorer that answer with `column(request, view)`."""

    def __init__(self, column):
        self._column = column

    def keep(self, request, view):
        return self._column(request, view)

    score = keep


def in_place(request, view):
    view.kv_usage[:] = 0
    return view.prefills


def at_leisure(request, view):
    time.sleep(0.05 if len(view) == 64 else 0)
    return view.prefills


def slowly(request, view):
    time.sleep(0)
    return np.array([any(a == b for b in reversed(view.ids)) for a in view.ids], np.bool_)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (lambda request, view: view.prefills[:1], r"keep\(\) returned bool \(1,\) for \d+ workers"),
        (lambda request, view: view.running, r"keep\(\) returned int64"),
        (lambda request, view: [True] * len(view), r"keep\(\) returned list"),
        (lambda request, view: view.kv_usage == view.kv_usage.max(), "raised what it may not: ValueError"),
        (lambda request, view: np.random.default_rng().random(len(view)) < 0.5, "answered differently"),
        (in_place, "wrote to the view"),
        (at_leisure, "times as long as the policy cost, more than 30"),
        (slowly, "a step is not linear in the fleet"),
    ],
)
def test_a_broken_filter_is_found_out(column, message):
    with pytest.raises(AssertionError, match=message):
        conformance.check_filter(lambda: Columns(column))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (lambda request, view: view.kv_usage[:1], r"score\(\) returned float64 \(1,\) for \d+ workers"),
        (lambda request, view: view.prefills, r"score\(\) returned bool"),
        (lambda request, view: view.kv_usage * 2.0, r"is not in \[0, 1\]"),
        (lambda request, view: -view.kv_usage, r"is not in \[0, 1\]"),
        (lambda request, view: np.full(len(view), np.nan), r"a score of nan is not in \[0, 1\]"),
        (lambda request, view: np.random.default_rng().random(len(view)), "answered differently"),
    ],
)
def test_a_broken_scorer_is_found_out(column, message):
    with pytest.raises(AssertionError, match=message):
        conformance.check_scorer(lambda: Columns(column))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (Order(lambda ticket: ticket.arrived_s), "not a tuple of numbers"),
        (Order(lambda ticket: (ticket.tenant,)), "not a tuple of numbers"),
        (Order(lambda ticket: (ticket.deadline_s - ticket.deadline_s,)), "holds NaN"),
        (Order(lambda ticket: (1.0,) * (1 + ticket.priority // 10 % 2)), r"keys of \[1, 2\] numbers"),
        (Order(lambda ticket: (np.random.default_rng().random(),)), "a key is fixed when the request comes"),
        (Order(lambda ticket: (1.0 / ticket.prompt_tokens,)), "raised what it may not: ZeroDivisionError"),
        (Order(lambda ticket: (1.0,), lambda ticket: ticket.ttft_slo_ms), "returned None, not an instant"),
    ],
)
def test_a_broken_order_is_found_out(order, message):
    with pytest.raises(AssertionError, match=message):
        conformance.check_order(order)


class BelievesAnything(Fixed):
    def observe(self, row, features, seen_ms):
        predicted = super().observe(row, features, seen_ms)
        self._coefficients[row, 0] = seen_ms
        return predicted


class OneForAll(Fixed):
    def observe(self, row, features, seen_ms):
        predicted = super().observe(row, features, seen_ms)
        self._coefficients *= 1.01 if 0 < seen_ms < 1e9 else 1.0
        return predicted


class Boasts(Fixed):
    def observe(self, row, features, seen_ms):
        return seen_ms


class IsSure(Fixed):
    def confidence(self, rows):
        return np.ones(len(rows))


class PredictsThePast(Fixed):
    def milliseconds(self, rows, features):
        return super().milliseconds(rows, features) - 100.0


class Reuses(Fixed):
    def add(self, prior):
        return super().add(prior * 0)


class Wobbles(Fixed):
    def milliseconds(self, rows, features):
        return super().milliseconds(rows, features) * np.random.default_rng().random()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (BelievesAnything, "an observation of nan ms, which cannot be, changed what it predicts"),
        (OneForAll, "what was observed on one row changed another"),
        (Boasts, r"observe\(\) said .* had been predicted, and milliseconds\(\) had said"),
        (IsSure, r"confidence\(\) is above 0 for a row on which nothing was observed"),
        (PredictsThePast, "a prediction is finite and never negative|had been predicted"),
        (Reuses, "does not start from the prior of its own"),
        (Wobbles, "had been predicted|predicted differently"),
    ],
)
def test_a_broken_predictor_is_found_out(broken, message):
    with pytest.raises(AssertionError, match=message):
        conformance.check_predictor(broken)
