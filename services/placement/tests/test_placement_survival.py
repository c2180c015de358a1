"""What is left after the service dies, a worker leaves, or everything happens at once."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from omni.placement.v1 import placement_service_pb2 as pb
from omni.placement.v1.placement_service_pb2_grpc import PlacementServiceStub
from omni_common.errors import FailedPrecondition, InvalidRequest, NotFound
from omni_common.rpc import channel
from omni_placement.app import Parts
from omni_placement.book import Exclusions, History, Outcome, Published
from omni_placement.files import LayoutFiles
from omni_placement.load.book import GroupName
from omni_placement.migration import apply_rounds
from omni_placement.session import Ack, Order, Session
from omni_placement.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))

from placement_client import DEADLINE_S, SHAPE, Worker, layout_of, refused, service

NAMES = {"model": "m", "group": "g"}
NAME = GroupName("m", "g")
CONFIGURED = {"num_layers": 1, "num_experts": 4, "num_ranks": 2, "slots_per_rank": 2}


@asynccontextmanager
async def process(state_dir: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, Any]]:
    """The real service as a process, and a stub of it."""
    environ = {"OMNI_PLACEMENT_PORT": "0", "OMNI_PLACEMENT_STATE_DIR": str(state_dir), "HOME": os.environ["HOME"]}
    started = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "omni_placement"), env=environ, stderr=asyncio.subprocess.PIPE
    )
    assert started.stderr is not None
    try:
        async with asyncio.timeout(60):
            while b'"serving"' not in (line := await started.stderr.readline()):
                assert line, "ended before serving"
        async with channel(f"127.0.0.1:{json.loads(line)['port']}") as connected:
            yield started, PlacementServiceStub(connected)  # type: ignore[no-untyped-call]
    finally:
        with contextlib.suppress(ProcessLookupError):
            started.kill()
        await started.communicate()


async def test_a_service_killed_in_the_middle_of_a_migration_goes_on_where_the_worker_is(tmp_path: Path) -> None:
    async with process(tmp_path) as (killed, stub):
        worker = Worker(stub, layout_of([0, 1], [2, 3]))
        watch, first = await worker.begin()
        await worker.carry_out(first)
        request = pb.PlanRequest(solver="round_robin", publish=True, **NAMES)
        target = (await stub.Plan(request, timeout=DEADLINE_S)).layout
        order = await watch.read()
        worker.apply(order.rounds[0])
        await worker.ack(order, 1)
        # This round is in the engine, and the service never hears of it.
        worker.apply(order.rounds[1])
        killed.send_signal(signal.SIGKILL)
        await killed.wait()
    async with process(tmp_path) as (_, stub):
        in_force = await stub.GetLayout(pb.GetLayoutRequest(**NAMES), timeout=DEADLINE_S)
        assert in_force.layout == target
        assert (in_force.status.applied_version, in_force.status.worker_id) == (1, "")
        worker = Worker(stub, worker.held)
        stale = await refused(worker.ack(order, 2))
        assert stale.reason == "unknown_migration"
        watch, rest = await worker.begin()
        assert rest.layout.layout_version == 2
        assert _moves(rest) == _moves(order) - len(order.rounds[0].moves) - len(order.rounds[1].moves)
        await worker.carry_out(rest)
        kept = (await stub.ListLayouts(pb.ListLayoutsRequest(**NAMES), timeout=DEADLINE_S)).records
        assert [(r.layout.layout_version, r.outcome) for r in kept] == [
            (2, pb.MIGRATION_OUTCOME_APPLIED),
            (1, pb.MIGRATION_OUTCOME_APPLIED),
        ]
        planned = np.array(target.physical_to_logical).reshape(SHAPE.shape)
        assert np.array_equal(np.sort(worker.held.physical, axis=2), np.sort(planned, axis=2))
        in_force = await stub.GetLayout(pb.GetLayoutRequest(**NAMES), timeout=DEADLINE_S)
        assert list(in_force.layout.physical_to_logical) == worker.held.physical.ravel().tolist()
        watch.cancel()


def _moves(order: pb.WatchLayoutsResponse) -> int:
    return sum(len(step.moves) for step in order.rounds)


async def test_excluded_ranks_and_history_survive_a_restart(tmp_path: Path) -> None:
    async with service(state_dir=tmp_path) as stub:
        await Worker(stub, layout_of([0, 1], [2, 3], [0, 2])).begin()
        await stub.SetRanks(pb.SetRanksRequest(excluded_ranks=[2], **NAMES), timeout=DEADLINE_S)
        before = (await stub.ListLayouts(pb.ListLayoutsRequest(**NAMES), timeout=DEADLINE_S)).records
    async with service(state_dir=tmp_path) as stub:
        assert (await stub.ListLayouts(pb.ListLayoutsRequest(**NAMES), timeout=DEADLINE_S)).records == before
        status = (await stub.GetLayout(pb.GetLayoutRequest(**NAMES), timeout=DEADLINE_S)).status
        assert list(status.excluded_ranks) == [2]


async def reported(stub: Any, model: str, group: str, num_layers: int) -> None:
    load = pb.ExpertLoad(num_layers=num_layers, num_experts=4, tokens=[1] * 4 * num_layers)
    request = pb.ReportLoadRequest(model=model, group=group, worker_id="w", load=load)
    await stub.ReportLoad(iter([request]), timeout=DEADLINE_S)


async def test_a_group_whose_worker_went_away_makes_room(tmp_path: Path) -> None:
    held = layout_of([0, 1], [2, 3])
    async with service(state_dir=tmp_path, max_groups=2, forget_after_s=0, models={"n": CONFIGURED}) as stub:
        first = Worker(stub, held, group="first", worker_id="first")
        watch, _ = await first.begin()
        await reported(stub, "m", "first", 2)
        await reported(stub, "n", "", 1)
        full = await refused(Worker(stub, held, group="second", worker_id="second").watch().read())
        assert full.code == "RESOURCE_EXHAUSTED"
        watch.cancel()
        second = Worker(stub, held, group="second", worker_id="second")
        async with asyncio.timeout(DEADLINE_S):
            # The service hears of the end of a watch in its own time.
            while True:
                watch = second.watch()
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await watch.read()
                    break
        groups = (await stub.ListGroups(pb.ListGroupsRequest(), timeout=DEADLINE_S)).groups
        assert [(g.model, g.group) for g in groups] == [("m", "second"), ("n", "")]
        # Load counts against the same bound.
        await reported(stub, "m", "second", 2)
        forgotten = await stub.GetLoad(pb.GetLoadRequest(model="m", group="first"), timeout=DEADLINE_S)
        assert not forgotten.loads
    assert sorted(history.name for history in LayoutFiles(tmp_path).load()) == [("m", "second"), ("n", "")]


def test_kinds_of_excluded_ranks_are_kept_apart_on_disk(tmp_path: Path) -> None:
    held = Published(NAME, 1, "held", layout_of([0, 1], [2, 3]))
    saved = History(NAME, (held,), Exclusions(frozenset({0}), frozenset({1}), frozenset({2})))
    files = LayoutFiles(tmp_path)
    files.load()
    files.save(saved)
    assert [history.exclusions for history in files.load()] == [saved.exclusions]


def test_layouts_saved_by_the_first_release_are_read(tmp_path: Path) -> None:
    content = {"model": "org/m", "version": 7, "solver": "identity", "topology": [1, 2, 2, 1]}
    (tmp_path / "org%2Fm.json").write_text(json.dumps({**content, "physical_to_logical": [0, 1]}))
    (history,) = LayoutFiles(tmp_path).load()
    assert history.name == GroupName("org/m", "")
    assert (history.in_force.version, history.in_force.solver) == (7, "identity")
    assert history.in_force.layout.physical.tolist() == [[[0], [1]]]
    assert (history.exclusions.ranks, history.in_force.outcome) == (frozenset(), Outcome.NONE)


LAYOUTS = [
    layout_of([0, 1], [2, 3]),
    layout_of([2, 3], [0, 1]),
    layout_of([3, 0], [1, 2], [3, 1]),
    layout_of([0, 1], [0, 2], [3, 0]),
    layout_of([1, 0], [2, 1], [3]),
]


class Engine:
    """A worker of `Rollout` that may leave, restart or fail at any moment."""

    def __init__(self, parts: Parts) -> None:
        self._rollout, self._recovery = parts.rollout, parts.recovery
        self.held = LAYOUTS[0]
        self.session: Session | None = None
        self.order: Order | None = None
        self.done = 0

    async def connect(self) -> None:
        if self.session is not None:
            self._rollout.detach(self.session)
        self.session = await self._rollout.attach(NAME, "w", self.held, is_fresh=self.held is LAYOUTS[0])
        await self.read()

    async def read(self) -> None:
        assert self.session is not None
        self.order, self.done = await anext(self.session.orders(), None), 0

    async def step(self, is_lost: bool) -> None:
        """A round, and the word of it unless that is lost."""
        if self.session is None or self.order is None:
            await self.connect()
            return
        if self.done < len(self.order.rounds):
            self.held = apply_rounds(self.held, [self.order.rounds[self.done]])
            self.done += 1
        is_last = self.done == len(self.order.rounds)
        if is_lost:
            self.session, self.order = None, None
            return
        await self._ack(Outcome.APPLIED if is_last else Outcome.APPLYING)
        self.order = None if is_last else self.order

    async def fail(self, ranks: frozenset[int]) -> None:
        """The round under way does not succeed."""
        if self.session is not None and self.order is not None:
            await self._ack(Outcome.FAILED, ranks)
            self.session, self.order = None, None

    async def _ack(self, outcome: Outcome, ranks: frozenset[int] = frozenset()) -> None:
        assert self.order is not None
        version, migration_id = self.order.published.version, self.order.migration_id
        try:
            await self._recovery.ack(Ack(NAME, "w", version, migration_id, self.done, outcome, ranks))
        except (FailedPrecondition, InvalidRequest):  # overtaken, or the ranks cannot be spared
            self.session, self.order = None, None


ACTIONS = st.one_of(
    st.tuples(st.just("publish"), st.integers(0, len(LAYOUTS) - 1), st.booleans()),
    st.tuples(st.sampled_from(["step", "step", "step", "connect", "restart", "read"]), st.just(0), st.booleans()),
    st.tuples(st.sampled_from(["fail", "lose", "exclude"]), st.integers(0, 2), st.booleans()),
    st.tuples(st.just("rollback"), st.integers(0, 5), st.booleans()),
)


@settings(deadline=None, max_examples=150)
@given(actions=st.lists(ACTIONS, max_size=40))
def test_whatever_happens_the_worker_ends_at_the_layout_in_force(actions: list[tuple[str, int, bool]]) -> None:
    asyncio.run(_play(actions))


async def _play(actions: list[tuple[str, int, bool]]) -> None:
    parts = Parts(Settings.model_validate({"history": 4}), CollectorRegistry(), lambda: 0.0)
    engine = Engine(parts)
    for action, number, flag in actions:
        with contextlib.suppress(FailedPrecondition, InvalidRequest, NotFound):
            await _act(parts, engine, action, number, flag)
    with contextlib.suppress(FailedPrecondition):
        await parts.recovery.set_ranks(NAME, frozenset()) if parts.layouts.find(NAME) else None
    await engine.connect()
    while engine.order is not None:
        await engine.step(is_lost=False)
    assert engine.held == parts.layouts.get(NAME).layout
    assert parts.layouts.get(NAME).outcome is Outcome.APPLIED
    assert parts.rollout.session(NAME) is engine.session


async def _act(parts: Parts, engine: Engine, action: str, number: int, flag: bool) -> None:
    if action == "publish":
        await parts.rollout.publish(NAME, LAYOUTS[number], "test", "test", is_urgent=flag)
    elif action == "step":
        await engine.step(is_lost=flag)
    elif action == "connect":
        await engine.connect()
    elif action == "restart":
        engine.held = LAYOUTS[0]
        await engine.connect()
    elif action == "fail":
        await engine.fail(frozenset())
    elif action == "lose":
        await engine.fail(frozenset({number}))
    elif action == "exclude":
        await parts.recovery.set_ranks(NAME, frozenset({number} if flag else ()))
    elif action == "rollback":
        await parts.recovery.rollback(NAME, number)
    elif engine.session is not None and engine.order is None and engine.session.order is not None:
        await engine.read()


@pytest.mark.parametrize("model", ["", "x" * 300, "é" * 100])
async def test_names_that_no_file_can_bear_are_refused(model: str) -> None:
    async with service() as stub:
        error = await refused(stub.GetLayout(pb.GetLayoutRequest(model=model), timeout=DEADLINE_S))
        assert (error.code, error.field) == ("INVALID_ARGUMENT", "model")
