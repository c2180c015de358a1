"""The default policy chooses what costs least of everything it could do, and says what that is."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from omni_common.errors import Unavailable
from omni_proxy.scheduling.cost import CostParameters, CostPolicy
from omni_proxy.scheduling.decision import Decision, Reason
from omni_proxy.scheduling.request import NO_SLO, SchedulingRequest, Slo
from omni_proxy.scheduling.samples import Sample, samples
from omni_proxy.scheduling.view import FleetView, WorkerRow, view_of

BREAKS = 1e9


@dataclass(frozen=True)
class Way:
    """One way to run a request. `known_ms` and `learned_ms` are of the worker that decodes, `cost_ms` is of all."""

    prefill: str | None
    decode: int
    cost_ms: float
    known_ms: float
    learned_ms: float


def ways(request: SchedulingRequest, view: FleetView, of: CostParameters) -> Iterator[Way]:
    """Every way to run the request, one at a time: the policy's module docstring in loops."""
    allowed = [row for row in range(len(view)) if view.ids[row] not in request.excluded]
    prefills = [row for row in allowed if view.prefills[row]]
    decodes = [row for row in allowed if view.decodes[row]]
    times = view.times
    shortest_ms = min(float(times.step_ms[row]) for row in decodes)

    def wait(row: int) -> float:
        return float(times.queue_ms[row] + view.load_ms[row] + of.adapter_weight * view.adapter_ms[row])

    def then(row: int) -> float:
        step_ms = float(times.step_ms[row])
        counted_ms = shortest_ms if step_ms <= (1 + of.alike) * shortest_ms else step_ms
        return float(times.seat_ms[row]) + of.horizon_tokens * counted_ms

    def breaks(row: int) -> bool:
        return request.slo.itl_ms is not None and bool(times.step_ms[row] > request.slo.itl_ms)

    for d in decodes:
        known = wait(d) + then(d) + BREAKS * (breaks(d) + holds_up(request, view, d, of))
        computing = float(times.prefill_ms[d])
        yield Way(None, d, known + computing, known, computing)
    for p, d in itertools.product(prefills, decodes):
        if can_pair(view, p, d):
            moved = float(times.transfer_ms(np.array([p]), np.array([d]))[0, 0])
            known = float(of.adapter_weight * view.adapter_ms[d]) + then(d) + BREAKS * breaks(d)
            yield Way(view.ids[p], d, wait(p) + float(times.prefill_ms[p]) + moved + known, known, moved)


def alike(way: Way, least: Way, view: FleetView, of: CostParameters) -> bool:
    """They differ in learned times at most, and there by little."""
    return (
        way.prefill == least.prefill
        and way.known_ms <= least.known_ms * (1 + 1e-12)
        and bool(view.cached_tokens[way.decode] >= view.cached_tokens[least.decode])
        and way.learned_ms <= (1 + of.alike) * least.learned_ms * (1 + 1e-12)
    )


def holds_up(request: SchedulingRequest, view: FleetView, row: int, of: CostParameters) -> bool:
    """Others there would wait too long for the prompt, or nothing is known of how long it takes."""
    times, slo_ms = view.times, request.slo.itl_ms
    if times.confidence.max() < of.min_confidence:
        return True
    step, stall = float(times.step_ms[row]), float(times.stall_ms[row])
    if slo_ms is None:
        return stall > of.stall_steps * step
    beside = float(times.queue_ms[row] + times.prefill_ms[row])
    return stall > of.stall_steps * slo_ms or step + beside / of.stall_tokens > slo_ms


def can_pair(view: FleetView, p: int, d: int) -> bool:
    groups = {view.groups[p], view.groups[d]} - {""}
    return p != d and view.connectors[p] == view.connectors[d] != "" and len(groups) < 2


PARAMETERS = [CostParameters.model_validate(values) for values in ({}, {"horizon_tokens": 0}, {"alike": 1.0})]


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), of=st.sampled_from(PARAMETERS))
@example(seed=1612, of=PARAMETERS[0])
def test_the_least_of_all_ways_is_chosen(seed: int, of: CostParameters) -> None:
    for sample in samples(seed, 8):
        # More prefill workers than are paired are another test's.
        if not sample.can_decode or sample.view.prefills.sum() > of.max_prefills:
            continue
        request = replace(sample.request, may_prefill=True, kv_connector=None, held_by=None)
        decision = CostPolicy(of).choose(request, sample.view)
        found = list(ways(request, sample.view, of))
        [chosen] = [w for w in found if (w.prefill, sample.view.ids[w.decode]) == (decision.prefill, decision.decode)]
        least_ms = min(way.cost_ms for way in found)
        groups = [
            [way for way in found if alike(way, least, sample.view, of)]
            for least in found
            if least.cost_ms == pytest.approx(least_ms, rel=1e-12)
        ]
        sequences = sample.view.sequences
        assert any(
            chosen in equals and sequences[chosen.decode] == min(sequences[way.decode] for way in equals)
            for equals in groups
        )
        said = decision.alone_costs if decision.prefill is None else decision.prefill_costs
        assert said.value.min() == pytest.approx(least_ms, rel=1e-12)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32))
def test_what_is_chosen_may_be(seed: int) -> None:
    for sample in samples(seed, 8):
        if not sample.can_decode:
            continue
        decision = CostPolicy().choose(sample.request, sample.view)
        view, rows = sample.view, {worker: row for row, worker in enumerate(sample.view.ids)}
        assert view.decodes[rows[decision.decode]]
        assert decision.decode not in sample.request.excluded
        if decision.prefill is not None:
            assert decision.prefill not in sample.request.excluded
            assert view.prefills[rows[decision.prefill]]
            assert can_pair(view, rows[decision.prefill], rows[decision.decode])
        assert (decision.prefill is None) or sample.request.may_prefill


@settings(deadline=None)
@given(seed=st.integers(0, 2**32))
def test_of_many_prefill_workers_alike_in_pairing_none_better_is_left_out(seed: int) -> None:
    draw = np.random.default_rng(seed)
    rows = [
        prefill(f"p{n}", queue_ms=draw.uniform(0, 100), prefill_ms=draw.uniform(0, 100), confidence=0.0)
        for n in range(20)
    ]
    best = min(rows, key=lambda row: row.queue_ms + row.prefill_ms)
    assert choose([*rows, decode("d", confidence=0.0), decode("e", confidence=0.0)]).prefill == best.worker_id


def prefill(name: str = "p", **of: Any) -> WorkerRow:
    return WorkerRow(name, prefills=True, **{"prefill_ms": 100.0, "step_ms": 10.0, **of})


def decode(name: str = "d", **of: Any) -> WorkerRow:
    return WorkerRow(name, decodes=True, **{"prefill_ms": 100.0, "step_ms": 10.0, "stall_ms": 20.0, **of})


def both(name: str = "b", **of: Any) -> WorkerRow:
    row = decode(name, **of)
    row.prefills = True
    return row


def choose(
    rows: Sequence[WorkerRow], pair_ms: float = 20.0, of: dict[str, Any] | None = None, **asked: Any
) -> Decision:
    request = SchedulingRequest(**{"prompt_tokens": 1000, **asked})
    return CostPolicy(CostParameters.model_validate(of or {})).choose(request, view_of(rows, pair_ms))


TIGHT = Slo(itl_ms=15.0)


@pytest.mark.parametrize(
    ("fleet", "asked", "chosen"),
    [
        pytest.param([prefill(queue_ms=50), decode()], {}, (None, "d", Reason.CHEAPER_ALONE), id="alone is less"),
        pytest.param([prefill(), decode(queue_ms=50)], {}, ("p", "d", Reason.DISAGGREGATED), id="a pair is less"),
        pytest.param(
            [prefill(), decode(stall_ms=40)], {}, ("p", "d", Reason.DISAGGREGATED), id="it would stall others"
        ),
        pytest.param(
            [prefill(confidence=0.4), decode(confidence=0.2)],
            {},
            ("p", "d", Reason.DISAGGREGATED),
            id="alone only when times are known",
        ),
        pytest.param([decode(stall_ms=1e6)], {}, (None, "d", Reason.NO_PREFILL), id="nobody else is there"),
        pytest.param(
            [prefill(), decode(connector="x")], {}, (None, "d", Reason.NO_CONNECTOR), id="no common connector"
        ),
        pytest.param(
            [prefill(connector=""), decode(connector="")], {}, (None, "d", Reason.NO_CONNECTOR), id="none at all"
        ),
        pytest.param(
            [prefill(group="g"), decode(group="h", queue_ms=900), decode("e", group="g", queue_ms=999, step_ms=30)],
            {},
            ("p", "e", Reason.DISAGGREGATED),
            id="a group keeps to itself",
        ),
        pytest.param(
            [prefill(), decode(step_ms=16, queue_ms=500), decode("e", step_ms=14, seat_ms=5000, queue_ms=500)],
            {"slo": TIGHT},
            ("p", "e", Reason.DISAGGREGATED),
            id="steps within the SLO whatever the wait",
        ),
        pytest.param(
            [prefill(), decode(step_ms=18), decode("e", step_ms=16, queue_ms=500)],
            {"slo": TIGHT},
            ("p", "e", Reason.DISAGGREGATED),
            id="the least where all break it",
        ),
        pytest.param(
            [prefill(queue_ms=500), decode(step_ms=18)],
            {"slo": TIGHT},
            ("p", "d", Reason.DISAGGREGATED),
            id="no prompt where steps are too long already",
        ),
        pytest.param(
            [prefill(), decode(seat_ms=400, queue_ms=500), decode("e", step_ms=30, queue_ms=500)],
            {},
            ("p", "e", Reason.DISAGGREGATED),
            id="a free seat is worth slower steps",
        ),
        pytest.param(
            [prefill(cached_tokens=900, prefill_ms=10, queue_ms=80), prefill("q"), decode(queue_ms=900)],
            {},
            ("p", "d", Reason.DISAGGREGATED),
            id="the cache, while its queue is short",
        ),
        pytest.param(
            [prefill(cached_tokens=900, prefill_ms=10, queue_ms=120), prefill("q"), decode(queue_ms=900)],
            {},
            ("q", "d", Reason.DISAGGREGATED),
            id="and no longer",
        ),
        pytest.param(
            [prefill(load_ms=30), prefill("q", prefill_ms=120), decode(queue_ms=900)],
            {},
            ("q", "d", Reason.DISAGGREGATED),
            id="loading counts",
        ),
        pytest.param(
            [prefill(), prefill("q", queue_ms=1), decode(queue_ms=900)],
            {"excluded": frozenset({"p"})},
            ("q", "d", Reason.DISAGGREGATED),
            id="the excluded are not asked",
        ),
        pytest.param([both(queue_ms=5)], {}, (None, "b", Reason.NO_CONNECTOR), id="never handed to itself"),
        pytest.param(
            [both(queue_ms=300), both("c", queue_ms=10, step_ms=40)],
            {"slo": TIGHT},
            ("c", "b", Reason.DISAGGREGATED),
            id="one of both roles prefills for another",
        ),
        pytest.param(
            [both(), prefill(queue_ms=30)], {}, (None, "b", Reason.CHEAPER_ALONE), id="both roles, alone where it pays"
        ),
        pytest.param(
            [prefill(), decode(queue_ms=900, own_requests=3), decode("e", queue_ms=900, step_ms=10.4)],
            {},
            ("p", "e", Reason.DISAGGREGATED),
            id="fewer sequences where steps are alike",
        ),
        pytest.param(
            [prefill(), decode(queue_ms=900, own_requests=3), decode("e", queue_ms=900, step_ms=12)],
            {},
            ("p", "d", Reason.DISAGGREGATED),
            id="faster steps where they are not",
        ),
        pytest.param(
            [decode(own_requests=3), decode("e", step_ms=10.4, prefill_ms=103)],
            {},
            (None, "e", Reason.NO_PREFILL),
            id="fewer sequences where prompts are alike too",
        ),
        pytest.param(
            [decode(own_requests=3, cached_tokens=16), decode("e", step_ms=10.4, prefill_ms=103)],
            {},
            (None, "d", Reason.NO_PREFILL),
            id="but not for a cache that is there",
        ),
    ],
)
def test_the_choice(fleet: list[WorkerRow], asked: dict[str, Any], chosen: tuple[str | None, str, Reason]) -> None:
    decision = choose(fleet, **asked)
    assert (decision.prefill, decision.decode, decision.reason) == chosen


@pytest.mark.parametrize(("least", "alone"), [(0, False), (500, False), (501, True), (None, True)])
def test_short_prompts_are_not_prefilled_apart(least: int | None, alone: bool) -> None:
    fleet = [prefill(), decode(cached_tokens=500, queue_ms=500)]
    decision = choose(fleet, of={"disaggregate_min_tokens": least})
    assert (decision.prefill is None) is alone
    assert decision.reason is (Reason.SHORT if alone else Reason.DISAGGREGATED)


CONTINUED = {"may_prefill": False, "kv_connector": "c", "held_by": "p"}


def test_blocks_that_nobody_left_can_pull_are_computed_again() -> None:
    """The holder drains, and with it the last decode worker of its kind."""
    fleet = [decode(connector="x", queue_ms=500, prefill_ms=4000), decode("e", connector="x", step_ms=11)]
    decision = choose(fleet, **CONTINUED)
    assert decision.decode == "e"
    assert decision.prediction.computed_ms > 0


@pytest.mark.parametrize(
    ("fleet", "asked", "chosen"),
    [
        pytest.param([prefill(), decode(step_ms=20), decode("e")], CONTINUED, "e", id="faster steps"),
        pytest.param(
            [prefill(), decode(queue_ms=9e5), decode("e", step_ms=11)], CONTINUED, "d", id="no prompt waits there"
        ),
        pytest.param([prefill(), decode(connector="x"), decode("e", step_ms=90)], CONTINUED, "e", id="who can pull"),
        pytest.param(
            [prefill(group="g"), decode(group="h"), decode("e", group="g", step_ms=12)],
            CONTINUED,
            "e",
            id="pulling beats computing again",
        ),
        pytest.param(
            [prefill(group="g"), decode(group="h", prefill_ms=1.0), decode("e", group="g", step_ms=12)],
            CONTINUED,
            "d",
            id="unless nearly all is there",
        ),
        pytest.param([decode(queue_ms=900), decode("e", step_ms=11)], CONTINUED, "d", id="the holder has gone"),
        pytest.param(
            [decode(queue_ms=900), decode("e", step_ms=11)], {"may_prefill": False}, "e", id="nothing waits: computed"
        ),
        pytest.param(
            [both("p", prefill_ms=0.5), decode("d")], CONTINUED, "p", id="the holder goes on itself, from its cache"
        ),
        pytest.param(
            [both("p", prefill_ms=0.5, step_ms=40), decode("d", seat_ms=700)],
            {**CONTINUED, "slo": TIGHT},
            "d",
            id="steps within the SLO",
        ),
    ],
)
def test_going_on(fleet: list[WorkerRow], asked: dict[str, Any], chosen: str) -> None:
    decision = choose(fleet, **asked)
    assert (decision.prefill, decision.decode, decision.reason) == (None, chosen, Reason.CONTINUED)
    assert decision.decode_costs.rows.tolist() == [
        row
        for row, worker in enumerate(fleet)
        if worker.decodes and (not asked.get("kv_connector") or worker.connector == "c")
    ]


def test_what_is_foreseen_of_going_on_is_the_pull() -> None:
    """Who pulls neither waits for prompts nor computes this one, but for a seat."""
    fleet = [prefill(), decode(queue_ms=700, prefill_ms=300, seat_ms=40)]
    foreseen = choose(fleet, pair_ms=25.0, **CONTINUED).prediction
    assert (foreseen.queue_ms, foreseen.prefill_ms, foreseen.transfer_ms) == (40.0, 0.0, 25.0)
    again = choose([decode(queue_ms=700, prefill_ms=300)], may_prefill=False).prediction
    assert (again.queue_ms, again.prefill_ms, again.transfer_ms) == (700.0, 300.0, 0.0)


def test_what_is_foreseen_is_of_the_workers_chosen() -> None:
    fleet = [prefill(queue_ms=7, confidence=0.9), decode(queue_ms=900, step_ms=13, confidence=0.1)]
    foreseen = choose(fleet, pair_ms=25.0).prediction
    assert (foreseen.queue_ms, foreseen.prefill_ms, foreseen.transfer_ms, foreseen.step_ms) == (7.0, 100.0, 25.0, 13.0)
    assert foreseen.confidence == 0.9


@pytest.mark.parametrize("rows", [[], [prefill()], [decode("gone")]])
def test_without_a_decode_worker_nothing_can_be_chosen(rows: list[WorkerRow]) -> None:
    with pytest.raises(Unavailable):
        choose(rows, excluded=frozenset({"gone"}))


@settings(deadline=None)
@given(
    steps=st.lists(st.floats(0.1, 100), min_size=1, max_size=6),
    slo_ms=st.floats(0.1, 100),
    seats=st.lists(st.floats(0, 1e6), min_size=6, max_size=6),
)
def test_the_slo_is_kept_wherever_it_can_be(steps: list[float], slo_ms: float, seats: list[float]) -> None:
    fleet = [
        decode(f"d{i}", step_ms=step, seat_ms=seat, queue_ms=1e7)
        for i, (step, seat) in enumerate(zip(steps, seats, strict=False))
    ]
    decision = choose([prefill(), *fleet], slo=Slo(itl_ms=slo_ms))
    chosen = steps[int(decision.decode[1:])]
    assert chosen <= slo_ms or min(steps) > slo_ms


def test_every_candidate_is_told_with_its_terms() -> None:
    fleet = [prefill(), prefill("q", connector="x"), both(), decode(connector="x"), decode("e", group="g")]
    told = choose(fleet, prompt_tokens=10).explained()["candidates"]
    assert {one["worker"] for one in told["prefill"]} == {"p", "q", "b"}
    assert {one["worker"] for one in told["alone"]} == {"b", "d", "e"}
    for leg in told.values():
        assert all(
            key == "cost" or math.isfinite(value) for one in leg for key, value in one.items() if key != "worker"
        )


def test_equal_workers_get_equal_shares_whatever_noise_was_learned() -> None:
    """At a low load, where every worker is idle or nearly so at every choice."""
    fleet = [prefill(), *(decode(f"d{i}", step_ms=10 + 0.1 * i, queue_ms=900) for i in range(4))]
    running: list[WorkerRow] = []
    for _ in range(400):
        decision = choose(fleet)
        [chosen] = [row for row in fleet if row.worker_id == decision.decode]
        chosen.own_requests, chosen.dispatched = chosen.own_requests + 1, chosen.dispatched + 1
        running.append(chosen)
        if len(running) > 2:
            running.pop(0).own_requests -= 1
    assert {row.dispatched for row in fleet if row.decodes} == {100}


def test_samples_hold_all_that_is_asked_here() -> None:
    """The random fleets are worth something: pairs, workers alone, and workers of both roles among them."""
    found = [sample for sample in samples(1, 400) if sample.can_decode]
    reasons = {CostPolicy().choose(replace(s.request, slo=NO_SLO), s.view).reason for s in found}
    assert reasons >= {
        Reason.DISAGGREGATED,
        Reason.CHEAPER_ALONE,
        Reason.NO_PREFILL,
        Reason.NO_CONNECTOR,
        Reason.CONTINUED,
    }
    assert any(bool((s.view.prefills & s.view.decodes).any()) for s in found)
    assert isinstance(found[0], Sample)


# Adapters


def test_bringing_an_adapter_in_counts_for_whoever_computes_and_for_decode() -> None:
    fleet = [prefill(adapter_ms=30.0, has_adapter=False), decode(adapter_ms=40.0, has_adapter=False, queue_ms=9e4)]
    [plain, named] = [choose(fleet, adapter=adapter) for adapter in ("", "x")]
    costs = [decision.prefill_costs.value[0] for decision in (plain, named)]
    assert costs[1] - costs[0] == pytest.approx(2 * 70.0)
    assert named.prediction.ttft_ms == pytest.approx(130.0) and named.prediction.adapter_ms == 30.0
    told = replace(named, adapter="x").explained()
    assert told["adapter"] == "x" and told["predicted"]["adapter_ms"] == 30.0
    terms = {leg: rows[0]["adapter_ms"] for leg, rows in told["candidates"].items()}
    assert terms == {"prefill": 2 * 30.0, "decode": 2 * 40.0, "alone": 2 * 40.0}
    assert "adapter" not in str(plain.explained()["candidates"]), "of no interest to others"
    going_on = choose(fleet, may_prefill=False, adapter="x").explained()["candidates"]["decode"][0]
    assert going_on["adapter_ms"] == 2 * 40.0


@pytest.mark.parametrize(("load_ms", "chosen"), [(20.0, ("p1", "d1")), (30.0, ("p2", "d2"))])
def test_a_slot_is_worth_what_it_saves(load_ms: float, chosen: tuple[str, str]) -> None:
    cold = {"has_adapter": False, "adapter_ms": load_ms}
    fleet = [prefill("p1", **cold), prefill("p2", queue_ms=50.0), decode("d1", queue_ms=9e4, **cold)]
    fleet.append(decode("d2", queue_ms=9e4, seat_ms=50.0))
    decision = choose(fleet, adapter="x")
    assert (decision.prefill, decision.decode) == chosen
