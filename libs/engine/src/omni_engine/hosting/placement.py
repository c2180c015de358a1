"""The engine's side of expert placement: layouts are watched, applied round by round, and acknowledged.

    WatchLayouts(held) --> orders --> engine.move_experts, one round at a time --> AckLayout
        |  ranks to leave out: engine.drop_ranks, at once
        +-- the stream ends: stop after the round under way, then watch again with what the engine holds then

What the engine says that it holds is the truth; whatever is lost on the way, the next watch starts from it.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
from opentelemetry import trace

from omni.placement.v1 import placement_service_pb2 as pb
from omni.placement.v1.placement_service_pb2_grpc import PlacementServiceStub
from omni_common.errors import FailedPrecondition, OmniError
from omni_common.rpc import trace_metadata
from omni_common.rpc_errors import log_fields
from omni_engine.hosting.admission import Admission
from omni_engine.hosting.bounded import bounded
from omni_engine.hosting.identity import Identity
from omni_engine.hosting.load_report import LoadReporter
from omni_engine.hosting.placement_wire import Order, layout_to_wire, order_from_wire
from omni_engine.hosting.settings import WorkerSettings
from omni_engine.ports import Engine, ExpertLayout, ExpertMove, RanksFailed

WatchCall = grpc.aio.UnaryStreamCall[pb.WatchLayoutsRequest, pb.WatchLayoutsResponse]
log = logging.getLogger(__name__)

IDEMPOTENT = ("omni.placement.v1.PlacementService/AckLayout",)
_CONNECT_TIMEOUT_S = 10.0
_ACK_TIMEOUT_S = 5.0
_DROP_TIMEOUT_S = 10.0
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.1, 2.0
_STEADY_S = 5.0


@dataclass(frozen=True, slots=True)
class PlacementReport:
    """Totals since the start, by outcome; `rank_imbalance` is the slowest over the mean rank of the newest window, 0
    before it."""

    is_connected: bool
    layout_version: int
    rank_imbalance: float
    rounds: int
    moves: int
    migrations: Counter[str] = field(default_factory=Counter)
    load_reports: Counter[str] = field(default_factory=Counter)


class PlacementClient:
    """Keeps the placement service told and the engine's experts where it wants them. Never stops serving."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        engine: Engine,
        admission: Admission,
        identity: Identity,
        settings: WorkerSettings,
    ) -> None:
        """The engine has a layout, and `channel` retries `IDEMPOTENT`."""
        self._stub = PlacementServiceStub(channel)  # type: ignore[no-untyped-call]
        self._engine = engine
        self._worker_id = identity.worker_id
        self._group = settings.expert_group or identity.worker_id
        self._move_timeout_s = settings.move_timeout_s
        self._dropped: tuple[int, ...] = ()
        self._is_connected = self._has_progressed = self._is_outage_logged = False
        self._rounds = self._moves = 0
        self._migrations: Counter[str] = Counter()
        template = pb.ReportLoadRequest(
            model=engine.info.model,
            group=self._group,
            worker_id=identity.worker_id,
            traffic_class=settings.traffic_class,
        )
        self._reporter = LoadReporter(
            self._stub, engine, admission, template, settings.load_interval_s, first_step=identity.epoch
        )

    def report(self) -> PlacementReport:
        layout = self._engine.expert_layout()
        return PlacementReport(
            self._is_connected,
            layout.version if layout else 0,
            self._reporter.rank_imbalance,
            self._rounds,
            self._moves,
            self._migrations,
            self._reporter.outcomes,
        )

    async def run(self) -> None:
        """Report load and follow layouts until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._reporter.run())
            group.create_task(self._follow())

    async def _follow(self) -> None:
        loop, backoff_s = asyncio.get_running_loop(), _FIRST_BACKOFF_S
        while True:
            started_s, self._has_progressed = loop.time(), False
            try:
                await self._watch()
            except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError, TimeoutError) as error:
                self._note_outage(error)
            except OmniError as error:
                log.warning("placement not followed", extra={"error": error.message, "reason": error.reason})
            self._is_connected = False
            if loop.time() - started_s > _STEADY_S or self._has_progressed:
                backoff_s = _FIRST_BACKOFF_S
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)

    async def _watch(self) -> None:
        """One stream, until it ends or one of its orders could not be carried out."""
        held = self._held()
        call: WatchCall = self._stub.WatchLayouts(
            pb.WatchLayoutsRequest(
                model=self._engine.info.model,
                group=self._group,
                worker_id=self._worker_id,
                held=layout_to_wire(self._engine.info, self._group, held),
            )
        )
        orders: asyncio.Queue[pb.WatchLayoutsResponse | None] = asyncio.Queue()
        reading = asyncio.create_task(self._read(call, orders), name="layouts")
        reading.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await call.wait_for_connection()
            while (message := await orders.get()) is not None and await self._carry_out(message, reading):
                pass
            if reading.done():
                await reading
        finally:
            reading.cancel()
            call.cancel()
            await asyncio.wait({reading})

    async def _read(self, call: WatchCall, orders: "asyncio.Queue[pb.WatchLayoutsResponse | None]") -> None:
        """Puts every order into the queue, None at the end; ranks to leave out do not wait for the orders before.

        The service has one order under way, so the queue needs no bound.
        """
        try:
            async for message in call:
                self._is_connected, self._is_outage_logged = True, False
                await self._drop(tuple(message.excluded_ranks))
                orders.put_nowait(message)
        finally:
            orders.put_nowait(None)

    async def _drop(self, ranks: tuple[int, ...]) -> None:
        if ranks == self._dropped:
            return
        try:
            await bounded(self._engine.drop_ranks(ranks), _DROP_TIMEOUT_S)
        except OmniError as error:
            log.error("ranks cannot be left out", extra={"ranks": ranks, "error": str(error)})
            return
        self._dropped = ranks
        log.warning("ranks left out" if ranks else "all ranks in use again", extra={"ranks": ranks})

    async def _carry_out(self, message: pb.WatchLayoutsResponse, stream: "asyncio.Task[None]") -> bool:
        """False where the watch must start anew: an order that failed, or one overtaken by the end of its stream."""
        attributes = {"omni.layout_version": message.layout.layout_version, "omni.rounds": len(message.rounds)}
        with trace.get_tracer("omni.hosting").start_as_current_span("experts.migration", attributes=attributes):
            rounds_done = 0
            try:
                order = order_from_wire(message, self._held())
                for rounds_done in range(1, len(order.steps) + 1):
                    if stream.done():
                        self._migrations["overtaken"] += 1
                        return False
                    await self._apply(order, rounds_done)
                    if rounds_done < len(order.steps):
                        await self._ack(message, pb.MIGRATION_OUTCOME_APPLYING, rounds_done)
                if not order.steps and order.target.version != self._held().version:
                    await self._move((), order.target)
            except OmniError as error:
                await self._give_up(message, max(0, rounds_done - 1), error)
                return False
        self._has_progressed = True
        self._migrations["applied"] += bool(order.steps)
        log.info("layout applied", extra={"layout_version": order.target.version, "rounds": len(order.steps),
                                          "moves": order.num_moves})  # fmt: skip
        await self._ack(message, pb.MIGRATION_OUTCOME_APPLIED, len(order.steps))
        return True

    async def _apply(self, order: Order, number: int) -> None:
        """The round of this number, from 1. The version is the target's with the last one only."""
        step = order.steps[number - 1]
        version = order.target.version if number == len(order.steps) else self._held().version
        await self._move(step.moves, ExpertLayout(version, step.physical))
        self._rounds += 1
        self._moves += len(step.moves)

    async def _move(self, moves: Sequence[ExpertMove], layout: ExpertLayout) -> None:
        await bounded(self._engine.move_experts(moves, layout), self._move_timeout_s)

    async def _give_up(self, message: pb.WatchLayoutsResponse, rounds_done: int, error: OmniError) -> None:
        self._migrations["failed"] += 1
        log.error("layout not applied", extra={"layout_version": message.layout.layout_version,
                                               "rounds_done": rounds_done, "error": error.message})  # fmt: skip
        ranks = error.ranks if isinstance(error, RanksFailed) else ()
        await self._ack(message, pb.MIGRATION_OUTCOME_FAILED, rounds_done, ranks, error.message)

    async def _ack(
        self,
        message: pb.WatchLayoutsResponse,
        outcome: pb.MigrationOutcome,
        rounds_done: int,
        failed_ranks: Sequence[int] = (),
        detail: str = "",
    ) -> None:
        await self._stub.AckLayout(
            pb.AckLayoutRequest(
                model=self._engine.info.model,
                group=self._group,
                worker_id=self._worker_id,
                layout_version=message.layout.layout_version,
                migration_id=message.migration_id,
                rounds_done=rounds_done,
                outcome=outcome,
                failed_ranks=failed_ranks,
                detail=detail,
            ),
            timeout=_ACK_TIMEOUT_S,
            metadata=trace_metadata(),
        )

    def _held(self) -> ExpertLayout:
        layout = self._engine.expert_layout()
        if layout is None:
            raise FailedPrecondition("the engine has no expert layout", reason="no_layout")
        return layout

    def _note_outage(self, error: Exception) -> None:
        if self._is_outage_logged:
            return
        self._is_outage_logged = True
        log.warning("layouts are not followed; serving goes on", extra=log_fields(error))
