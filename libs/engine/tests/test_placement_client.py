"""The engine's side of expert placement against a scripted service over real gRPC."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from scripted_placement import Placement, serving

from conftest import Settings
from omni.engine.v1 import engine_pb2
from omni.engine.v1.worker_service_pb2 import DescribeRequest
from omni.placement.v1 import placement_service_pb2 as pb
from omni.prefill.v1.prefill_service_pb2 import PrefillRequest
from omni_common.rpc import channel
from omni_engine.hosting.admission import Admission
from omni_engine.hosting.identity import Identity
from omni_engine.hosting.load_report import MAX_MERGED, LoadReporter
from omni_engine.hosting.placement import IDEMPOTENT, PlacementClient
from omni_engine.ports import PrefillJob, SamplingParams
from omni_engine.sim import SimEngine, SimSettings

LAYERS, EXPERTS, RANKS = 3, 4, 2
EXPERT_RANKS = {
    "num_moe_layers": LAYERS,
    "num_experts": EXPERTS,
    "experts_per_token": 2,
    "experts": {"num_ranks": RANKS, "spare_slots": 4, "switch_ms": 0},
}
ONE_TOKEN = SamplingParams(max_tokens=1, ignore_eos=True)


def layout(seed: int) -> np.ndarray:
    """A valid layout: every expert on one rank or both."""
    drawn = np.random.default_rng(seed)
    physical = np.full((LAYERS, RANKS, EXPERTS), -1, dtype=np.int32)
    for layer in range(LAYERS):
        held = drawn.random((RANKS, EXPERTS)) < 0.6
        held[0] |= ~held.any(axis=0)
        for rank in range(RANKS):
            experts = drawn.permutation(np.nonzero(held[rank])[0])
            physical[layer, rank, drawn.choice(EXPERTS, len(experts), replace=False)] = experts
    return physical


class GatedEngine(SimEngine):
    """Every round waits for `gate`; `reached` is set when one does."""

    def __init__(self, settings):
        super().__init__(settings)
        self.gate, self.reached = asyncio.Event(), asyncio.Event()
        self.gate.set()

    async def move_experts(self, moves, layout):
        self.reached.set()
        await self.gate.wait()
        await super().move_experts(moves, layout)


@dataclass
class Placed:
    engine: GatedEngine
    client: PlacementClient
    admission: Admission

    @property
    def held(self) -> np.ndarray:
        return self.engine.expert_layout().physical

    @property
    def version(self) -> int:
        return self.engine.expert_layout().version

    async def compute(self, name: str, tokens: int = 10) -> None:
        await self.engine.prefill(PrefillJob(name, [sum(name.encode()) + 7, *range(tokens - 1)], ONE_TOKEN))


@asynccontextmanager
async def placed(port: int, worker_id: str = "w", **values: object) -> AsyncIterator[Placed]:
    """A simulated engine and its placement client."""
    parsed = Settings.model_validate({"worker_id": worker_id, "load_interval_s": 0.01, **values})
    engine = GatedEngine(SimSettings.model_validate(EXPERT_RANKS))
    await engine.start()
    admission, identity = Admission("sim"), Identity(1000, worker_id=worker_id)
    async with channel(f"127.0.0.1:{port}", idempotent=IDEMPOTENT) as connected:
        client = PlacementClient(connected, engine, admission, identity, parsed)
        running = asyncio.create_task(client.run())
        try:
            yield Placed(engine, client, admission)
            assert not running.done()
        finally:
            running.cancel()
            await asyncio.wait({running})
            await engine.close()


async def test_a_layout_is_applied_round_by_round_and_acknowledged():
    async with serving(Placement()) as service, placed(service.port) as worker:
        await service.until(lambda: service.is_settled("w"))
        target = layout(1)
        await service.publish("w", target)
        await service.until(lambda: service.is_settled("w"))
        assert (worker.held == target).all() and worker.version == 2
        rounds = LAYERS
        assert [(a.layout_version, a.rounds_done, a.outcome) for a in service.acks] == [
            (1, 0, pb.MIGRATION_OUTCOME_APPLIED),
            *((2, done, pb.MIGRATION_OUTCOME_APPLYING) for done in range(1, rounds)),
            (2, rounds, pb.MIGRATION_OUTCOME_APPLIED),
        ]
        report = worker.client.report()
        assert (report.is_connected, report.layout_version, report.rounds, report.migrations) == (
            True, 2, rounds, {"applied": 1},
        )  # fmt: skip


async def test_groups_are_told_apart():
    async with (
        serving(Placement()) as service,
        placed(service.port, "a") as one,
        placed(service.port, "b", expert_group="other") as two,
    ):
        await service.until(lambda: service.is_settled("a") and service.is_settled("other"))
        await service.publish("other", layout(2))
        await service.publish("a", layout(1))
        await service.until(lambda: service.is_settled("a") and service.is_settled("other"))
        assert (one.held == layout(1)).all() and (two.held == layout(2)).all()
        assert {(a.group, a.worker_id) for a in service.acks} == {("a", "a"), ("other", "b")}


async def test_a_failed_round_is_told_with_its_ranks_and_the_layout_before_is_restored():
    async with serving(Placement()) as service, placed(service.port) as worker:
        await service.until(lambda: service.is_settled("w"))
        before = worker.held
        worker.engine.faults.failed_ranks = (1,)
        await service.publish("w", layout(1))
        failed = pb.MIGRATION_OUTCOME_FAILED
        await service.until(lambda: service.acks[-1].outcome == failed)
        assert list(service.acks[-1].failed_ranks) == [1]
        assert "do not answer" in service.acks[-1].detail and service.acks[-1].rounds_done == 0
        assert (worker.held == before).all() and worker.version == 1
        worker.engine.faults.failed_ranks = ()
        await service.publish("w", before)
        await service.until(lambda: service.is_settled("w"))
        assert worker.version == 3


async def test_a_watch_that_ends_stops_the_migration_after_the_round_under_way():
    async with serving(Placement()) as service, placed(service.port) as worker:
        await service.until(lambda: service.is_settled("w"))
        worker.engine.gate.clear()
        worker.engine.reached.clear()
        await service.publish("w", layout(1))
        await worker.engine.reached.wait()
        after_one = service.groups["w"].sent[0]
        await service.publish("w", layout(2))
        watches = service.groups["w"].watches
        worker.engine.gate.set()
        await service.until(lambda: service.groups["w"].watches > watches)
        assert (service.groups["w"].held == after_one).all() and service.groups["w"].held_version == 1
        await service.until(lambda: service.is_settled("w"))
        assert (worker.held == layout(2)).all()
        assert worker.client.report().migrations == {"overtaken": 1, "applied": 1}


async def test_ranks_are_left_out_at_once_even_while_a_round_is_under_way(until):
    async with serving(Placement()) as service, placed(service.port) as worker:
        await service.until(lambda: service.is_settled("w"))
        both = np.broadcast_to(np.arange(EXPERTS, dtype=np.int32), (LAYERS, RANKS, EXPERTS))
        assert (worker.held == both).all()
        await worker.compute("a")
        await until(lambda: service.reports)
        worker.engine.gate.clear()
        await service.publish("w", layout(1))
        await worker.engine.reached.wait()
        await service.exclude("w", 1)
        worker.engine.gate.set()
        only_first = both.copy()
        only_first[:, 1] = -1
        await service.publish("w", only_first)
        await service.until(lambda: service.is_settled("w"))
        reported = len(service.reports)
        await worker.compute("b")
        await until(lambda: len(service.reports) > reported)
        ranks = np.array(service.reports[-1].rank_tokens).reshape(LAYERS, RANKS)
        assert (ranks[:, 0] > 0).all() and not ranks[:, 1].any()


async def test_ranks_are_left_out_without_any_move(until):
    async with serving(Placement()) as service, placed(service.port) as worker:
        await service.until(lambda: service.is_settled("w"))
        for excluded, is_used in (((0,), False), ((), True)):
            acks = len(service.acks)
            await service.exclude("w", *excluded)
            await service.until(lambda acks=acks: len(service.acks) > acks)
            reported = len(service.reports)
            await worker.compute(f"x{excluded}")
            await until(lambda reported=reported: len(service.reports) > reported)
            ranks = np.array(service.reports[-1].rank_tokens).reshape(LAYERS, RANKS)
            assert ranks[:, 0].any() == is_used


async def test_rounds_that_do_not_lead_to_the_layout_are_not_begun():
    class Confused(Placement):
        def _order(self, name, group):
            order = super()._order(name, group)
            if len(order.rounds) > 1:
                del order.rounds[-1]
            return order

    async with serving(Confused()) as service, placed(service.port) as worker:
        await service.until(lambda: service.is_settled("w"))
        before = worker.held
        await service.publish("w", layout(1))
        await service.until(lambda: service.acks[-1].outcome == pb.MIGRATION_OUTCOME_FAILED)
        assert "do not lead" in service.acks[-1].detail
        assert (worker.held == before).all()


async def test_load_is_reported_with_its_phase_and_layout(until):
    async with serving(Placement()) as service, placed(service.port, traffic_class="chat") as worker:
        await service.until(lambda: service.is_settled("w"))
        await worker.compute("a", tokens=12)
        await service.until(lambda: service.reports)
        report = service.reports[0]
        assert (report.model, report.group, report.worker_id, report.traffic_class) == ("sim", "w", "w", "chat")
        assert (report.phase, report.layout_version, report.tokens) == (pb.PHASE_PREFILL, 1, 12)
        assert (report.first_step, report.last_step) == (1000, 1000)
        assert sum(report.load.tokens) == sum(report.rank_tokens) == 12 * 2 * LAYERS
        assert report.duration_ms > 0
        worker.admission.set_role("decode")
        await worker.compute("b")
        await service.until(lambda: len(service.reports) > 1)
        assert (service.reports[1].phase, service.reports[1].first_step) == (pb.PHASE_DECODE, 1001)
        assert worker.client.report().rank_imbalance >= 1


async def test_no_load_is_lost_or_counted_twice_while_answers_are_lost(until):
    async with serving(Placement()) as service, placed(service.port) as worker:
        await service.until(lambda: service.is_settled("w"))
        service.lose_next_reports = 3
        for number in range(12):
            await worker.compute(f"p{number}")
        counted = lambda: {(r.first_step, r.last_step): r.tokens for r in service.reports}  # noqa: E731
        await until(lambda: sum(counted().values()) >= 120 and not service.lose_next_reports)
        spans = sorted(counted())
        assert sum(counted().values()) == 120
        assert [first for first, _ in spans] == [1000, *(last + 1 for _, last in spans[:-1])]
        assert worker.client.report().load_reports["undelivered"] == 3


async def test_what_an_outage_leaves_is_bounded_and_the_newest():
    class Absent:
        def ReportLoad(self, requests, timeout):
            raise AssertionError("not called")

    engine = SimEngine(SimSettings.model_validate(EXPERT_RANKS))
    await engine.start()
    reporter = LoadReporter(Absent(), engine, Admission("sim"), pb.ReportLoadRequest(), 1.0, first_step=0)
    for number in range(MAX_MERGED + 2):
        await engine.prefill(PrefillJob(f"p{number}", [number, 1, 2], ONE_TOKEN))
        await reporter._gather()
    await engine.close()
    kept = reporter._gathered
    assert (kept.num_merged, kept.last_step, kept.load.steps) == (2, MAX_MERGED + 1, 2)
    assert reporter.outcomes == {"dropped": 1}


async def test_reports_that_are_refused_are_not_sent_again(until, caplog):
    async with serving(Placement()) as service, placed(service.port) as worker:
        service.refuse_reports = True
        for number in range(3):
            await worker.compute(f"p{number}")
            await until(lambda number=number: worker.client.report().load_reports["refused"] > number)
        assert len([r for r in caplog.records if "refuses load reports" in r.message]) == 1
        service.refuse_reports = False
        await worker.compute("later")
        await service.until(lambda: service.reports)
        assert service.reports[0].tokens == 10


async def test_an_engine_that_raises_what_it_should_not_fails_the_order_only(until):
    async with serving(Placement()) as service, placed(service.port) as worker:
        await service.until(lambda: service.is_settled("w"))

        async def broken(*_):
            raise RuntimeError("assertion of the engine")

        worker.engine.move_experts = worker.engine.expert_load = broken
        await service.publish("w", layout(1))
        await service.until(lambda: service.acks[-1].outcome == pb.MIGRATION_OUTCOME_FAILED)
        assert "RuntimeError" in service.acks[-1].detail
        await until(lambda: worker.client.report().load_reports["unread"])


async def test_a_worker_serves_without_its_placement_service_and_finds_it_later(hosted, until):
    service = Placement()
    async with serving(service):
        pass
    settings = {"placement": f"127.0.0.1:{service.port}", "sim": EXPERT_RANKS, "load_interval_s": 0.01}
    async with hosted(worker_id="w", **settings) as worker:
        sampling = engine_pb2.Sampling(max_tokens=1, ignore_eos=True)
        request = PrefillRequest(request_id="a", model="sim", token_ids=range(20), sampling=sampling)
        await worker.prefill.Prefill(request, timeout=5)
        read = worker.registry.get_sample_value
        assert read("omni_worker_placement_connected") == 0
        async with serving(service, service.port):
            await service.until(lambda: service.is_settled("w") and service.reports)
            await service.publish("w", layout(1))
            await service.until(lambda: service.is_settled("w"))
            described = await worker.worker.Describe(DescribeRequest(), timeout=5)
            assert described.info.layout_version == 2
            assert read("omni_worker_placement_connected") == 1
            assert read("omni_worker_expert_layout_version") == 2
            assert read("omni_worker_expert_rank_imbalance_ratio") >= 1
            assert read("omni_worker_expert_rounds_total") == LAYERS
            assert read("omni_worker_expert_moves_total") > 0
            assert read("omni_worker_expert_migrations_total", {"outcome": "applied"}) == 1
            assert read("omni_worker_expert_load_reports_total", {"outcome": "delivered"}) >= 1
        await until(lambda: read("omni_worker_placement_connected") == 0)
        await worker.prefill.Prefill(request, timeout=5)


async def test_a_worker_without_expert_ranks_does_not_ask(hosted):
    async with serving(Placement()) as service, hosted(placement=f"127.0.0.1:{service.port}") as worker:
        assert worker.host.placement is None
        assert not service.groups


ACTIONS = st.one_of(
    st.tuples(st.just("publish"), st.integers(0, 50)),
    st.tuples(st.just("exclude"), st.sampled_from([(), (1,)])),
    st.tuples(st.sampled_from(["cut", "restart", "wait"]), st.none()),
    st.tuples(st.sampled_from(["fail moves", "fail acks"]), st.integers(1, 2)),
    st.tuples(st.just("worker restarts"), st.none()),
    st.tuples(st.just("turns"), st.integers(0, 30)),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(ACTIONS, min_size=1, max_size=10))
def test_whatever_fails_the_service_and_the_engine_agree_in_the_end(actions):
    asyncio.run(_agree_after(actions))


async def _agree_after(actions) -> None:
    service = Placement()
    async with AsyncExitStack() as worker_life, AsyncExitStack() as service_life:
        await service_life.enter_async_context(serving(service))
        worker = await worker_life.enter_async_context(placed(service.port))
        await service.until(lambda: "w" in service.groups)
        for action, value in actions:
            if action == "publish":
                await service.publish("w", layout(value))
            elif action == "exclude":
                await service.exclude("w", *value)
            elif action == "cut":
                await service.cut()
            elif action == "restart":
                await service_life.aclose()
                await service_life.enter_async_context(serving(service, service.port))
            elif action == "worker restarts":
                await worker_life.aclose()
                watches = service.groups["w"].watches
                worker = await worker_life.enter_async_context(placed(service.port))
                await service.until(lambda watches=watches: service.groups["w"].watches > watches)
            elif action == "fail moves":
                worker.engine.faults.fail_next_moves = value
            elif action == "fail acks":
                service.fail_next_acks = value
            elif action == "wait":
                await service.until(lambda: service.is_settled("w") or service.groups["w"].sent)
            else:
                for _ in range(value):
                    await asyncio.sleep(0)
            assert all(set(experts.ravel()) >= set(range(EXPERTS)) for experts in worker.held)
        worker.engine.faults.fail_next_moves = service.fail_next_acks = 0
        await service.exclude("w")
        await service.until(lambda: service.is_settled("w"))
        assert (worker.held == service.groups["w"].target).all()
        assert worker.version == service.groups["w"].version
