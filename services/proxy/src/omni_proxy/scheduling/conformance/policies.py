"""Policies, and every single decision of theirs."""

import json
from collections.abc import Callable
from functools import partial

import numpy as np

from omni_common.errors import Unavailable
from omni_proxy.scheduling.conformance.trials import SAMPLES, fail, grows_linearly, keeps_little, takes_little, unharmed
from omni_proxy.scheduling.decision import Decision, LegCosts, Reason, eligible
from omni_proxy.scheduling.interfaces import Policy
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.samples import Sample, no_workers, samples
from omni_proxy.scheduling.view import FleetView, Rows


def check_policy(make: Callable[[], Policy], seed: int = 0) -> None:
    """Raises AssertionError: what the policy does wrong."""
    policy = make()
    _refuses_an_empty_fleet(policy)
    chosen = [_checked_choice(policy, sample) for sample in samples(seed, SAMPLES)]
    again = make()
    for sample, first in zip(samples(seed, SAMPLES), chosen, strict=True):
        second = choice_of(again, sample)
        if _key(first) != _key(second):
            fail(f"two policies made alike chose {_key(first)} and {_key(second)} for the same requests in a row")
    for trial in (takes_little, grows_linearly, keeps_little):
        trial(make, lambda one, sample: one.choose(sample.request, sample.view))


def check_decision(request: SchedulingRequest, view: FleetView, decision: Decision) -> None:
    """Raises AssertionError: what a policy may not have decided for that request on that fleet."""
    prefills, decodes = eligible(request, view)
    if decision.ids != view.ids:
        fail("the decision's ids are not the view's")
    decode = _row(view, "decode", decision.decode, decodes, request)
    prefill = None
    if decision.prefill is not None:
        prefill = _row(view, "prefill", decision.prefill, prefills, request)
        if prefill == decode:
            fail(f"{decision.decode} was chosen for both legs; without a prefill leg it computes the prompt itself")
        if not view.can_pair(np.array([prefill]), np.array([decode])).all():
            fail(f"{decision.prefill} and {decision.decode} cannot pair")
    uncached = max(request.prompt_tokens - int(view.cached_tokens[decode if prefill is None else prefill]), 0)
    if decision.uncached_tokens != uncached:
        fail(f"uncached_tokens is {decision.uncached_tokens}, the worker that computes the prompt lacks {uncached}")
    if not decision.policy:
        fail("the decision does not name its policy")
    _check_reason(request, decision)
    _check_costs("prefill_costs", decision.prefill_costs, prefills, prefill)
    _check_costs("decode_costs", decision.decode_costs, decodes, None if prefill is None else decode)
    _check_costs("alone_costs", decision.alone_costs, decodes, None)
    stated = [costs for costs in (decision.decode_costs, decision.alone_costs) if decode in costs.rows]
    if not stated:
        fail(f"no cost is stated for {decision.decode}, which was chosen to decode")
    if not any(np.isfinite(costs.value[costs.rows == decode]).all() for costs in stated):
        fail(f"the cost of {decision.decode}, which was chosen, is infinite")
    json.dumps(decision.explained(), allow_nan=True)


def _refuses_an_empty_fleet(policy: Policy) -> None:
    sample = no_workers()
    try:
        policy.choose(sample.request, sample.view)
    except Unavailable:
        return
    except Exception as error:
        fail(f"raised {type(error).__name__} on an empty fleet, not Unavailable: {error}")
    fail("chose a worker of an empty fleet")


def choice_of(policy: Policy, sample: Sample) -> Decision | None:
    """None where it refused."""
    try:
        return policy.choose(sample.request, sample.view)
    except Unavailable:
        return None


def _checked_choice(policy: Policy, sample: Sample) -> Decision | None:
    decision = unharmed(sample, partial(choice_of, policy, sample))
    can_decode = sample.can_decode
    if decision is None and can_decode:
        fail("raised Unavailable though a decode worker takes work")
    if decision is not None and not can_decode:
        fail(f"chose {decision.decode} though no decode worker takes work")
    if decision is not None:
        check_decision(sample.request, sample.view, decision)
    return decision


def _row(view: FleetView, leg: str, worker: str, allowed: Rows, request: SchedulingRequest) -> int:
    if worker not in view.ids:
        fail(f"{worker!r} was chosen for {leg} and is not in the view")
    row = view.ids.index(worker)
    if row not in allowed:
        fail(f"{worker} was chosen for {leg}{_why_not(view, leg, row, request)}")
    return row


def _why_not(view: FleetView, leg: str, row: int, request: SchedulingRequest) -> str:
    if view.ids[row] in request.excluded:
        return " and is excluded"
    if not (view.prefills if leg == "prefill" else view.decodes)[row]:
        return ", which it does not do"
    if leg == "prefill":
        return ", but the request may not be prefilled apart"
    return " and cannot pull the blocks that wait, while others can"


def _check_reason(request: SchedulingRequest, decision: Decision) -> None:
    """Pages and metrics tell by it which decision a prompt was computed by."""
    if (decision.reason is Reason.CONTINUED) == request.may_prefill:
        whose = "a prompt that is still to be computed" if request.may_prefill else "a request that goes on"
        fail(f"the reason is {decision.reason} for {whose}; Reason.CONTINUED is for those that go on (no may_prefill)")
    if (decision.reason is Reason.DISAGGREGATED) != (decision.prefill is not None):
        fail(f"the reason is {decision.reason} and prefill is {decision.prefill}; Reason.DISAGGREGATED is for a pair")


def _check_costs(name: str, costs: LegCosts, allowed: Rows, chosen: int | None) -> None:
    rows = [int(row) for row in costs.rows]
    if len(set(rows)) < len(rows) or not set(rows) <= {int(row) for row in allowed}:
        fail(f"{name} has rows that are not candidates, or has one twice")
    for term, column in (("value", costs.value), *costs.terms.items()):
        if len(column) != len(rows):
            fail(f"{name}: {term} has {len(column)} entries for {len(rows)} workers")
        if np.isnan(column).any():
            fail(f"{name}: {term} is NaN for a worker")
    if chosen is not None and not (chosen in rows and np.isfinite(costs.value[rows.index(chosen)])):
        fail(f"{name} states no finite cost for the worker that was chosen")


def _key(decision: Decision | None) -> tuple[str | None, str] | None:
    return None if decision is None else (decision.prefill, decision.decode)
