"""Layouts on their way into workers, through the wire."""

import asyncio
import contextlib
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from omni.placement.v1 import placement_service_pb2 as pb
from omni_placement.book import History, LayoutBook, Outcome
from omni_placement.load.book import GroupName
from omni_placement.rollout import Rollout
from omni_placement.session import Ack

sys.path.insert(0, str(Path(__file__).parent))

from placement_client import (
    DEADLINE_S,
    SHAPE,
    Clock,
    Worker,
    ended,
    layout_of,
    refused,
    service,
    serving,
    topology_to_wire,
)

IDENTITY = layout_of([0, 1], [2, 3])
SPARE = layout_of([0, 1], [2, 3], [0, 2])
NAMES = {"model": "m", "group": "g"}
APPLYING, APPLIED = pb.MIGRATION_OUTCOME_APPLYING, pb.MIGRATION_OUTCOME_APPLIED
FAILED = pb.MIGRATION_OUTCOME_FAILED


async def publish(stub: Any, solver: str = "round_robin", **fields: Any) -> pb.PlanResponse:
    request = pb.PlanRequest(solver=solver, publish=True, **{**NAMES, **fields})
    return await stub.Plan(request, timeout=DEADLINE_S)  # type: ignore[no-any-return]


async def get(stub: Any, **names: str) -> pb.GetLayoutResponse:
    return await stub.GetLayout(pb.GetLayoutRequest(**(names or NAMES)), timeout=DEADLINE_S)  # type: ignore[no-any-return]


async def records(stub: Any) -> list[tuple[int, str, int]]:
    """Version, reason and outcome of what is kept, newest first."""
    answer = await stub.ListLayouts(pb.ListLayoutsRequest(**NAMES), timeout=DEADLINE_S)
    return [(r.layout.layout_version, r.reason, r.outcome) for r in answer.records]


async def test_a_group_is_known_from_its_worker_and_follows_what_is_published() -> None:
    async with service() as stub:
        worker = Worker(stub, IDENTITY)
        watch, first = await worker.begin()
        assert (first.layout.layout_version, list(first.rounds), bool(first.migration_id)) == (1, [], True)
        await worker.carry_out(first)
        planned = await publish(stub)
        assert planned.layout.layout_version == 2
        assert planned.moved_bytes == 10 * 100
        order = await watch.read()
        assert len(order.rounds) == planned.num_rounds >= 4
        status = (await get(stub)).status
        assert (status.worker_id, status.applied_version, status.migration_id) == ("w", 1, order.migration_id)
        await worker.carry_out(order)
        answer = await get(stub)
        assert worker.held.physical.ravel().tolist() == list(answer.layout.physical_to_logical)
        assert (answer.status.applied_version, answer.status.migration_id) == (2, "")
        assert await records(stub) == [(2, "requested", APPLIED), (1, "worker_held", APPLIED)]
        # What a worker tells of its topology is part of the group's.
        assert answer.layout.topology.expert_bytes == 100


async def test_only_what_is_urgent_overtakes_a_migration_under_way() -> None:
    async with service() as stub:
        worker = Worker(stub, IDENTITY)
        watch, first = await worker.begin()
        await worker.carry_out(first)
        await publish(stub)
        order = await watch.read()
        error = await refused(publish(stub, "identity"))
        assert (error.code, error.reason, error.field) == ("FAILED_PRECONDITION", "migration_in_flight", "publish")
        worker.apply(order.rounds[0])
        await worker.ack(order, 1)
        assert (await get(stub)).status.rounds_done == 1
        # A rollback ends the stream; the worker is told the way back from where it is.
        back = await stub.Rollback(pb.RollbackRequest(**NAMES), timeout=DEADLINE_S)
        assert back.layout.layout_version == 3
        assert await ended(watch)
        stale = await refused(worker.ack(order, 2))
        assert (stale.code, stale.reason) == ("FAILED_PRECONDITION", "unknown_migration")
        watch, order = await worker.begin()
        await worker.carry_out(order)
        assert sorted(worker.held.physical[0, 0]) == [0, 1]
        assert (await records(stub))[0] == (3, "rolled_back", APPLIED)


async def test_a_worker_that_comes_back_is_sent_the_rest() -> None:
    async with service() as stub:
        worker = Worker(stub, IDENTITY)
        watch, first = await worker.begin()
        await worker.carry_out(first)
        await publish(stub)
        order = await watch.read()
        worker.apply(order.rounds[0])
        watch.cancel()
        again, rest = await worker.begin()
        assert rest.layout.layout_version == 2 and len(rest.rounds) == len(order.rounds) - 1
        await worker.carry_out(rest)
        # A restarted engine holds what it started with, and is taken to the layout in force from there.
        restarted = Worker(stub, IDENTITY)
        _, order = await restarted.begin()
        assert await ended(again)
        await restarted.carry_out(order)
        assert (await records(stub))[0] == (2, "requested", APPLIED)


async def test_repeated_acks_change_nothing_and_impossible_ones_are_refused() -> None:
    async with service() as stub:
        worker = Worker(stub, IDENTITY)
        watch, first = await worker.begin()
        await worker.ack(first, 0, APPLIED)
        await worker.ack(first, 0, APPLIED)
        await publish(stub)
        order = await watch.read()
        await worker.ack(order, 2)
        await worker.ack(order, 2)
        impossible: list[tuple[str, dict[str, Any]]] = [
            ("rounds_done", {"rounds_done": 1}),
            ("rounds_done", {"rounds_done": 9}),
            ("rounds_done", {"rounds_done": 3, "outcome": APPLIED}),
            ("layout_version", {"rounds_done": 3, "layout_version": 7}),
            ("migration_id", {"rounds_done": 3, "migration_id": "other"}),
            ("worker_id", {"rounds_done": 3, "worker_id": "other"}),
            ("outcome", {"rounds_done": 3, "outcome": 0}),
            ("failed_ranks", {"rounds_done": 3, "failed_ranks": [1]}),
        ]
        for field, fields in impossible:
            assert (await refused(worker.ack(order, **fields))).field == field
        assert (await get(stub)).status.rounds_done == 2


async def test_a_failed_layout_is_rolled_back_and_a_failed_way_back_leaves_the_worker_where_it_is() -> None:
    async with service() as stub:
        worker = Worker(stub, IDENTITY)
        watch, first = await worker.begin()
        await worker.carry_out(first)
        await publish(stub)
        order = await watch.read()
        worker.apply(order.rounds[0])
        await asyncio.gather(
            *(worker.ack(order, 1, FAILED, detail="no memory") for _ in range(3)), return_exceptions=True
        )
        assert await ended(watch)
        assert (await records(stub))[:2] == [
            (3, "rolled_back", pb.MIGRATION_OUTCOME_APPLYING),
            (2, "requested", FAILED),
        ]
        watch, order = await worker.begin()
        assert order.layout.layout_version == 3 and order.rounds
        await worker.ack(order, 0, FAILED)
        assert await ended(watch)
        watch, order = await worker.begin()
        assert (order.layout.layout_version, list(order.rounds)) == (4, [])
        await worker.carry_out(order)
        assert (await records(stub))[:2] == [(4, "kept", APPLIED), (3, "rolled_back", FAILED)]


async def test_without_a_rank_that_failed() -> None:
    async with service() as stub:
        worker = Worker(stub, SPARE)
        watch, first = await worker.begin()
        await worker.carry_out(first)
        await publish(stub)
        order = await watch.read()
        await worker.ack(order, 0, FAILED, failed_ranks=[2])
        assert await ended(watch)
        watch, order = await worker.begin()
        assert list(order.excluded_ranks) == [2]
        await worker.carry_out(order)
        assert (worker.held.physical[:, 2] == -1).all()
        answer = await get(stub)
        assert list(answer.status.excluded_ranks) == [2]
        assert (await records(stub))[0] == (3, "rank_failed", APPLIED)
        # It comes back, and holds experts again.
        await stub.SetRanks(pb.SetRanksRequest(**NAMES), timeout=DEADLINE_S)
        order = await watch.read()
        assert not order.excluded_ranks
        await worker.carry_out(order)
        assert (worker.held.physical[:, 2] != -1).any()


async def test_an_engine_that_starts_anew_has_its_failed_ranks_back_but_not_those_a_person_named() -> None:
    async with service() as stub:
        worker = Worker(stub, SPARE)
        watch, first = await worker.begin()
        await worker.carry_out(first)
        await publish(stub)
        await worker.ack(await watch.read(), 0, FAILED, failed_ranks=[2])
        assert await ended(watch)
        assert list((await get(stub)).status.excluded_ranks) == [2]
        _, order = await Worker(stub, SPARE).begin()
        assert not order.excluded_ranks
        await stub.SetRanks(pb.SetRanksRequest(excluded_ranks=[2], **NAMES), timeout=DEADLINE_S)
        again = Worker(stub, SPARE)
        _, order = await again.begin()
        assert not order.excluded_ranks and list((await get(stub)).status.excluded_ranks) == [2]
        await again.carry_out(order)
        assert (again.held.physical[:, 2] == -1).all()


async def test_a_healthy_rank_sends_what_it_alone_holds_before_it_is_left_out() -> None:
    async with service() as stub:
        worker = Worker(stub, layout_of([0, 1], [2, 3], [0, 1]))
        watch, first = await worker.begin()
        await worker.carry_out(first)
        what_if = await stub.Plan(pb.PlanRequest(excluded_ranks=[1], **NAMES), timeout=DEADLINE_S)
        assert what_if.num_rounds > 0
        without = (await stub.SetRanks(pb.SetRanksRequest(excluded_ranks=[1], **NAMES), timeout=DEADLINE_S)).layout
        order = await watch.read()
        assert not order.excluded_ranks and order.layout == without
        assert {m.expert for step in order.rounds for m in step.moves if m.source_rank == 1} == {2, 3}
        await worker.carry_out(order)
        assert (worker.held.physical[:, 1] == -1).all()
        await stub.SetRanks(pb.SetRanksRequest(**NAMES), timeout=DEADLINE_S)
        await worker.carry_out(await watch.read())
        planned = await publish(stub, excluded_ranks=[1])
        await worker.carry_out(await watch.read())
        assert planned.layout.layout_version == 4 and (worker.held.physical[:, 1] == -1).all()


@pytest.mark.parametrize("failed_ranks", [[], [1]], ids=["round failed", "rank failed"])
async def test_what_is_held_stays_where_a_rank_cannot_be_emptied(failed_ranks: list[int]) -> None:
    async with service() as stub:
        worker = Worker(stub, layout_of([0, 1], [2, 3], [0, 1]))
        watch, first = await worker.begin()
        await worker.carry_out(first)
        await stub.SetRanks(pb.SetRanksRequest(excluded_ranks=[1], **NAMES), timeout=DEADLINE_S)
        order = await watch.read()
        with contextlib.suppress(grpc.aio.AioRpcError):
            await worker.ack(order, 0, FAILED, failed_ranks=failed_ranks)
        assert await ended(watch)
        watch, order = await worker.begin()
        assert not order.rounds and (await records(stub))[0][:2] == (3, "kept")
        assert list((await get(stub)).status.excluded_ranks) == [1]


async def test_a_rank_that_failed_sends_nothing_even_if_a_person_names_it_too() -> None:
    async with service() as stub:
        worker = Worker(stub, SPARE)
        watch, first = await worker.begin()
        await worker.carry_out(first)
        await publish(stub)
        await worker.ack(await watch.read(), 0, FAILED, failed_ranks=[2])
        assert await ended(watch)
        watch, order = await worker.begin()
        await stub.SetRanks(pb.SetRanksRequest(excluded_ranks=[2], **NAMES), timeout=DEADLINE_S)
        assert await ended(watch)
        watch, order = await worker.begin()
        assert list(order.excluded_ranks) == [2]
        assert all(2 not in (m.source_rank, m.target_rank) for step in order.rounds for m in step.moves)


async def test_ranks_that_fail_before_anything_was_applied_stay_excluded() -> None:
    async with service() as stub:
        worker = Worker(stub, SPARE)
        watch, first = await worker.begin()
        await worker.ack(first, 0, FAILED, failed_ranks=[2])
        assert await ended(watch)
        _, order = await worker.begin()
        assert list(order.excluded_ranks) == [2]
        await worker.carry_out(order)


async def test_what_only_failed_ranks_hold_is_named_and_nothing_moves() -> None:
    async with service() as stub:
        worker = Worker(stub, layout_of([0, 1], [2, 3], [0, 1]))
        watch, first = await worker.begin()
        await worker.carry_out(first)
        await publish(stub)
        order = await watch.read()
        error = await refused(worker.ack(order, 0, FAILED, failed_ranks=[1]))
        assert (error.code, error.reason, error.field) == ("FAILED_PRECONDITION", "lost_expert", "excluded_ranks")
        assert "failed ranks [1] held the only copy of expert 2 of layer 0, 3 of layer 0" in error.message
        watch, order = await worker.begin()
        assert not order.rounds and (await records(stub))[0][:2] == (3, "kept")


@pytest.mark.parametrize(
    ("ranks", "field"), [([7], "excluded_ranks"), ([0, 1], "excluded_ranks")], ids=["unknown", "too few left"]
)
async def test_ranks_that_cannot_be_excluded_are_refused(ranks: list[int], field: str) -> None:
    async with service() as stub:
        await publish(stub, "identity", topology=topology_to_wire(SHAPE))
        error = await refused(stub.SetRanks(pb.SetRanksRequest(excluded_ranks=ranks, **NAMES), timeout=DEADLINE_S))
        assert (error.code, error.field) == ("INVALID_ARGUMENT", field)


async def test_a_migration_of_which_nothing_is_heard_is_given_up() -> None:
    async with service(round_timeout_s=0.2) as stub:
        worker = Worker(stub, IDENTITY)
        watch, first = await worker.begin()
        await worker.carry_out(first)
        await publish(stub)
        assert (await watch.read()).rounds
        assert await ended(watch)
        assert (await records(stub))[:2] == [
            (3, "rolled_back", pb.MIGRATION_OUTCOME_APPLYING),
            (2, "requested", FAILED),
        ]


async def test_what_is_carried_out_while_others_are_given_up_is_not_given_up() -> None:
    clock = Clock()
    rollout = Rollout(LayoutBook(None, clock, groups=2, history=2, watch_queue=1), clock, 90, {}, 3600)
    first, second = GroupName("m", "a"), GroupName("m", "b")
    sessions = [await rollout.attach(name, "w", IDENTITY) for name in (first, second)]
    clock.now_s += 91
    overdue = rollout.overdue()
    assert next(overdue).name == first
    order = sessions[1].order
    assert order is not None
    await rollout.ack(Ack(second, "w", 1, order.migration_id, 0, Outcome.APPLIED))
    assert list(overdue) == []


class SlowStore:
    """Keeps the newest version saved. Each save waits until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.newest = 0

    def save(self, history: History) -> None:
        self.begun.release()
        assert self.go.acquire(timeout=DEADLINE_S)
        self.newest = history.in_force.version

    def remove(self, name: GroupName) -> None:
        raise AssertionError("nothing is forgotten here")


async def test_an_ack_that_is_cancelled_while_it_is_saved_does_not_undo_what_follows() -> None:
    store, clock, name = SlowStore(), Clock(), GroupName("m", "g")
    store.go.release()
    rollout = Rollout(LayoutBook(store, clock, groups=2, history=4, watch_queue=1), clock, 90, {}, 3600)
    session = await rollout.attach(name, "w", IDENTITY)
    assert store.begun.acquire(blocking=False) and session.order is not None
    ack = asyncio.create_task(rollout.ack(Ack(name, "w", 1, session.order.migration_id, 0, Outcome.APPLIED)))
    assert await asyncio.to_thread(store.begun.acquire, timeout=DEADLINE_S)
    ack.cancel()
    await asyncio.wait({ack})
    publishing = asyncio.create_task(rollout.publish(name, SPARE, "imported", "requested"))
    assert not await asyncio.to_thread(store.begun.acquire, timeout=0.2), "two saves at once"
    store.go.release(2)
    assert (await publishing).version == store.newest == 2


async def test_rollback_to_a_version() -> None:
    async with service(history=3) as stub:
        for solver in ("identity", "round_robin", "identity", "round_robin"):
            await publish(stub, solver, topology=topology_to_wire(SHAPE))
        assert [version for version, _, _ in await records(stub)] == [4, 3, 2]
        request = pb.RollbackRequest(to_version=2, **NAMES)
        layout = (await stub.Rollback(request, timeout=DEADLINE_S)).layout
        assert (layout.layout_version, layout.solver) == (5, "round_robin")
        gone = await refused(stub.Rollback(pb.RollbackRequest(to_version=1, **NAMES), timeout=DEADLINE_S))
        assert (gone.code, gone.field) == ("NOT_FOUND", "to_version")
        await stub.SetRanks(pb.SetRanksRequest(excluded_ranks=[2], **NAMES), timeout=DEADLINE_S)
        unusable = await refused(stub.Rollback(pb.RollbackRequest(to_version=5, **NAMES), timeout=DEADLINE_S))
        assert (unusable.code, unusable.field) == ("INVALID_ARGUMENT", "to_version")


async def test_workers_that_do_not_fit_are_refused_by_field() -> None:
    async with service(max_groups=1) as stub:
        held = Worker(stub, IDENTITY)
        watch, _ = await held.begin()
        small = layout_of([0, 1], [2, 3], shape=type(SHAPE)(2, 4, 2, 2))
        cases = [
            (Worker(stub, small), "FAILED_PRECONDITION", "held.topology"),
            (Worker(stub, IDENTITY, worker_id="other"), "FAILED_PRECONDITION", "worker_id"),
            (Worker(stub, IDENTITY, worker_id=""), "INVALID_ARGUMENT", "worker_id"),
            (Worker(stub, IDENTITY, model=""), "INVALID_ARGUMENT", "model"),
            (Worker(stub, IDENTITY, group="x" * 300), "INVALID_ARGUMENT", "group"),
            (Worker(stub, IDENTITY, group="second"), "RESOURCE_EXHAUSTED", None),
        ]
        for worker, code, field in cases:
            error = await refused(worker.watch().read())
            assert (error.code, error.field) == (code, field)
        broken = pb.Layout(topology=topology_to_wire(SHAPE), physical_to_logical=[0, 1])
        request = pb.WatchLayoutsRequest(worker_id="w", held=broken, **NAMES)
        assert (
            await refused(stub.WatchLayouts(request, timeout=DEADLINE_S).read())
        ).field == "held.physical_to_logical"
        assert (await get(stub)).status.worker_id == "w"
        watch.cancel()


async def test_groups_of_a_model_go_their_own_ways() -> None:
    async with service() as stub:
        one, two = Worker(stub, IDENTITY), Worker(stub, SPARE, group="h", worker_id="v")
        watches = []
        for worker in (one, two):
            watch, order = await worker.begin()
            await worker.carry_out(order)
            watches.append(watch)
        ambiguous = await refused(get(stub, model="m"))
        assert (ambiguous.code, ambiguous.field) == ("INVALID_ARGUMENT", "group")
        await publish(stub)
        await one.carry_out(await watches[0].read())
        groups = (await stub.ListGroups(pb.ListGroupsRequest(), timeout=DEADLINE_S)).groups
        assert [(g.group, g.worker_id, g.layout_version, g.applied_version) for g in groups] == [
            ("g", "w", 2, 2),
            ("h", "v", 1, 1),
        ]
        observer = stub.WatchLayouts(pb.WatchLayoutsRequest(model="m", group="h"), timeout=DEADLINE_S)
        assert (await observer.read()).layout.group == "h"
        watches[1].cancel()
        await publish(stub, group="h")
        seen = await observer.read()
        assert (seen.layout.layout_version, list(seen.rounds), seen.migration_id) == (2, [], "")


async def test_a_configured_topology_completes_what_the_worker_tells() -> None:
    shape = {"num_layers": 2, "num_experts": 4, "num_ranks": 3, "slots_per_rank": 2, "ranks_per_host": 2}
    async with service(models={"m": shape}) as stub:
        watch, order = await Worker(stub, IDENTITY).begin()
        assert (order.layout.topology.ranks_per_host, order.layout.topology.expert_bytes) == (2, 100)
        bare = pb.Topology(num_layers=2, num_experts=4, num_ranks=3, slots_per_rank=2)
        planned = (await stub.Plan(pb.PlanRequest(topology=bare, **NAMES), timeout=DEADLINE_S)).layout
        assert planned.topology == order.layout.topology
        watch.cancel()


async def test_the_end_of_the_service_ends_its_watches() -> None:
    async with serving() as (placement, stub):
        watch, _ = await Worker(stub, IDENTITY).begin()
        await placement.drain()
        assert await ended(watch)
