"""From reported load to a layout that pays, through the wire."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from omni.placement.v1 import placement_service_pb2 as pb
from omni_placement.layout import Layout, Topology
from omni_placement.load.book import GroupName
from omni_placement.problem import Problem
from omni_placement.solvers import SOLVERS

sys.path.insert(0, str(Path(__file__).parent))

from placement_client import DEADLINE_S, Clock, Worker, layout_of, refused, service, serving, topology_to_wire

SHAPE = Topology(2, 8, 4, 3, expert_bytes=1000)
HELD = layout_of([0, 1], [2, 3], [4, 5], [6, 7], shape=SHAPE)
NAME = GroupName("m", "g")
NAMES = NAME._asdict()
SKEWED = np.array([[90, 80, 10, 10, 10, 10, 10, 10]] * 2) * 1000


async def report(stub: Any, tokens: np.ndarray, held: Layout = HELD, first_step: int = 1, **fields: Any) -> int:
    """One window of a hundred steps, with what each rank computed under `held`."""
    message = pb.ReportLoadRequest(
        worker_id="w",
        first_step=first_step,
        last_step=first_step + 99,
        load=pb.ExpertLoad(num_layers=2, num_experts=8, tokens=tokens.ravel().tolist()),
        rank_tokens=[int(n) for n in held.rank_loads(tokens).ravel()],
        duration_ms=500,
        phase=pb.PHASE_DECODE,
        **{**NAMES, **fields},
    )
    answer = await stub.ReportLoad(iter([message]), timeout=DEADLINE_S)
    return answer.accepted_windows  # type: ignore[no-any-return]


async def attached(stub: Any) -> tuple[Worker, Any]:
    """A worker that has applied what it was first sent, and its watch."""
    worker = Worker(stub, HELD)
    watch, first = await worker.begin()
    await worker.carry_out(first)
    return worker, watch


async def test_skewed_load_is_evened_out_when_it_pays_and_not_again() -> None:
    clock, registry = Clock(), CollectorRegistry()
    async with serving(clock, registry, economy={"min_interval_s": 120}) as (placement, stub):
        worker, watch = await attached(stub)
        look = placement.parts.rebalancer.look
        assert await look(NAME) == "no_load"
        clock.now_s += 60
        assert await report(stub, SKEWED) == 1
        assert await look(NAME) == "min_interval"
        for step in (101, 201):
            clock.now_s += 60
            await report(stub, SKEWED, first_step=step)
        what_if = await stub.Plan(pb.PlanRequest(**NAMES), timeout=DEADLINE_S)
        assert (what_if.decision.publish, what_if.decision.reason) == (True, "pays")
        assert what_if.decision.gain_ms > what_if.decision.cost_ms > 0
        slowest = float(HELD.rank_loads(SKEWED).max(axis=1).sum())
        assert what_if.decision.ms_per_token == pytest.approx(0.3 * 500 / slowest)
        assert what_if.predicted_step_load < what_if.current_step_load
        assert (np.array(what_if.lower_bound) <= what_if.current_step_load / 2).all()
        assert await look(NAME) == "pays"
        assert await look(NAME) == "migration_in_flight"
        order = await watch.read()
        await worker.carry_out(order)
        assert worker.held.balancedness(SKEWED).min() > HELD.balancedness(SKEWED).min() + 0.3
        clock.now_s += 121
        await report(stub, SKEWED, worker.held, first_step=301)
        assert await look(NAME) in ("same_layout", "no_gain", "least_gain", "costs_more")
        (newest, _) = (await stub.ListLayouts(pb.ListLayoutsRequest(**NAMES), timeout=DEADLINE_S)).records
        assert (newest.reason, newest.outcome) == ("rebalanced", pb.MIGRATION_OUTCOME_APPLIED)
        assert newest.layout.solver == "omni"
        known = await stub.GetLoad(pb.GetLoadRequest(**NAMES), timeout=DEADLINE_S)
        assert known.measured_imbalance == pytest.approx(known.predicted_imbalance, rel=0.01)
        assert len(known.forecast) == len(known.spread) == 16
        assert [(k.phase, k.windows) for k in known.loads] == [(pb.PHASE_DECODE, 4)]

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"omni_placement_{name}", {**NAMES, **labels})

    assert value("decisions_total", reason="pays") == value("decisions_total", reason="min_interval") == 1
    assert value("layout_version") == value("applied_version") == 2
    assert value("migrations_total", outcome="applied") == 2  # the layout the worker came with, and this one
    assert value("moved_bytes_total") == 1000 * sum(len(step.moves) for step in order.rounds)
    assert value("rounds_total") == len(order.rounds)
    measured = value("measured_imbalance")
    assert measured is not None and measured < 1.3
    assert registry.get_sample_value("omni_placement_plan_seconds_count", {"solver": "omni"}) == 4


async def test_a_plan_that_does_not_pay_says_what_it_would_gain_and_cost() -> None:
    async with service(economy={"stall_ms_per_round": 1e9, "ms_per_token": 0.25, "min_interval_s": 0}) as stub:
        await attached(stub)
        load = pb.ExpertLoad(num_layers=2, num_experts=8, tokens=SKEWED.ravel().tolist())
        planned = await stub.Plan(pb.PlanRequest(load=load, **NAMES), timeout=DEADLINE_S)
        told = planned.decision
        assert (told.publish, told.reason, told.ms_per_token) == (False, "costs_more", 0.25)
        assert 0 < told.gain_ms <= 0.25 * (planned.current_step_load - planned.predicted_step_load) * (1 + 1e-9)
        assert told.cost_ms >= 1e9


async def test_ranks_that_hold_nothing_do_not_count_as_unevenly_loaded() -> None:
    async with service() as stub:
        worker, watch = await attached(stub)
        await stub.SetRanks(pb.SetRanksRequest(**NAMES, excluded_ranks=[3]), timeout=DEADLINE_S)
        loads = HELD.rank_loads(SKEWED)
        await report(stub, SKEWED)
        draining = await stub.GetLoad(pb.GetLoadRequest(**NAMES), timeout=DEADLINE_S)
        assert draining.measured_imbalance == pytest.approx(loads.max(axis=1).sum() / loads.mean(axis=1).sum())
        await worker.carry_out(await watch.read())
        assert not worker.held.indicator[3].any()
        await report(stub, SKEWED, worker.held, first_step=101)
        emptied = await stub.GetLoad(pb.GetLoadRequest(**NAMES), timeout=DEADLINE_S)
        assert emptied.measured_imbalance == pytest.approx(emptied.predicted_imbalance, rel=0.01)


async def test_silent_groups_are_left_alone_and_do_not_hold_up_others() -> None:
    clock = Clock()
    async with serving(clock) as (placement, stub):
        _, watch = await attached(stub)
        await report(stub, SKEWED)
        clock.now_s += 301
        assert await placement.parts.rebalancer.look(NAME) == "no_load"
        assert await placement.parts.rebalancer.look(GroupName("m", "unknown")) == "no_load"
        watch.cancel()


async def test_what_is_known_of_the_load_survives_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    async with serving(clock, state_dir=tmp_path) as (_, stub):
        await attached(stub)
        for step in (1, 101, 201):
            await report(stub, SKEWED, first_step=step)
            clock.now_s += 60
        before = await stub.GetLoad(pb.GetLoadRequest(**NAMES), timeout=DEADLINE_S)
    async with serving(clock, state_dir=tmp_path) as (_, stub):
        after = await stub.GetLoad(pb.GetLoadRequest(**NAMES), timeout=DEADLINE_S)
        shares = [np.array(known.forecast) / sum(known.forecast) for known in (before, after)]
        np.testing.assert_allclose(shares[0], shares[1], atol=0.01)
        planned = await stub.Plan(pb.PlanRequest(**NAMES), timeout=DEADLINE_S)
        assert planned.predicted_step_load < planned.current_step_load


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"load": pb.ExpertLoad(num_layers=1, num_experts=8, tokens=[1] * 8), "rank_tokens": []}, "load"),
        ({"rank_tokens": [1] * 7}, "rank_tokens"),
        ({"rank_tokens": [1] * 6}, "rank_tokens"),
        ({"rank_tokens": [2**60] * 8}, "rank_tokens"),
        ({"first_step": 9, "last_step": 8}, "last_step"),
        ({"duration_ms": float("nan")}, "duration_ms"),
        ({"phase": 9}, "phase"),
        ({"model": ""}, "model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_unusable_reports_are_refused_by_field(fields: dict[str, Any], field: str) -> None:
    async with service() as stub:
        await attached(stub)
        load = pb.ExpertLoad(num_layers=2, num_experts=8, tokens=[1] * 16)
        message = pb.ReportLoadRequest(**{"worker_id": "w", "load": load, **NAMES, **fields})
        error = await refused(stub.ReportLoad(iter([message]), timeout=DEADLINE_S))
        assert (error.code, error.field) == ("INVALID_ARGUMENT", field)


async def test_a_plan_honours_what_it_is_asked_for() -> None:
    async with service() as stub:
        ask = pb.PlanRequest(
            topology=topology_to_wire(SHAPE),
            load=pb.ExpertLoad(num_layers=2, num_experts=8, tokens=SKEWED.ravel().tolist()),
            budget=2,
            excluded_ranks=[3],
            pins=[pb.Pin(layer=1, expert=5, rank=0)],
            **NAMES,
        )
        layout = (await stub.Plan(ask, timeout=DEADLINE_S)).layout
        physical = np.array(layout.physical_to_logical).reshape(SHAPE.shape)
        assert (physical[:, 3] == -1).all()
        assert 5 in physical[1, 0]
        assert (physical != -1).sum() <= 2 * 8 + 2
        ask.pins[0].rank = 3
        assert (await refused(stub.Plan(ask, timeout=DEADLINE_S))).field == "pinned"


async def test_an_exact_layout_is_published_as_it_is() -> None:
    async with service() as stub:
        worker, watch = await attached(stub)
        mine = SOLVERS["greedy_lpt"](Problem(SHAPE, SKEWED.astype(np.float64)))
        exact = pb.Layout(topology=topology_to_wire(SHAPE), physical_to_logical=mine.physical.ravel().tolist())
        dry = await stub.Plan(pb.PlanRequest(exact=exact, **NAMES), timeout=DEADLINE_S)
        assert dry.layout.layout_version == 0 and dry.num_rounds > 0
        for solver, kept_as in (("", "imported"), ("by hand", "by hand")):
            ask = pb.PlanRequest(exact=exact, publish=True, solver=solver, **NAMES)
            assert (await stub.Plan(ask, timeout=DEADLINE_S)).layout.solver == kept_as
            await worker.carry_out(await watch.read())
            np.testing.assert_array_equal(worker.held.indicator, mine.indicator)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"budget": 0}, "budget"),
        ({"excluded_ranks": [0]}, "excluded_ranks"),
        ({"pins": [pb.Pin()]}, "pins"),
        ({"max_replicas": 1}, "max_replicas"),
        ({"topology": pb.Topology()}, "topology"),
        ({"solver": "x" * 65}, "solver"),
        ({"exact": pb.Layout(topology=topology_to_wire(SHAPE), physical_to_logical=[0])}, "exact.physical_to_logical"),
        ({"exact": pb.Layout()}, "topology.num_layers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_an_exact_layout_that_cannot_be_is_refused_by_field(fields: dict[str, Any], field: str) -> None:
    async with service() as stub:
        await attached(stub)
        exact = pb.Layout(topology=topology_to_wire(SHAPE), physical_to_logical=HELD.physical.ravel().tolist())
        ask = pb.PlanRequest(publish=True, **{"exact": exact, **NAMES, **fields})
        error = await refused(stub.Plan(ask, timeout=DEADLINE_S))
        assert (error.code, error.field) == ("INVALID_ARGUMENT", field)


async def test_an_exact_layout_leaves_slots_empty_that_no_routed_expert_may_have() -> None:
    shape = {"num_layers": 1, "num_experts": 2, "num_ranks": 3, "slots_per_rank": 1, "shared_ranks": [2]}
    async with service(models={"m": shape}) as stub:
        topology = pb.Topology(num_layers=1, num_experts=2, num_ranks=3, slots_per_rank=1)
        exact = pb.Layout(topology=topology, physical_to_logical=[0, 1, 0])
        error = await refused(stub.Plan(pb.PlanRequest(model="m", exact=exact), timeout=DEADLINE_S))
        assert (error.field, error.reason) == ("physical_to_logical", "invalid_layout")
        assert "slot 0 of rank 2" in error.message
