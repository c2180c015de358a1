"""The gate over a scripted room and a clock that moves when told to."""

import asyncio
import math
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry

from omni_common.errors import DeadlineExceeded, Internal, OmniError, ResourceExhausted, Unavailable
from omni_proxy.flow import queue as queue_module
from omni_proxy.flow.gate import FlowGate, Turn
from omni_proxy.flow.metrics import FlowMetrics, Release
from omni_proxy.flow.orders import ORDERS, Order
from omni_proxy.flow.pace import Pace
from omni_proxy.flow.queue import FlowQueue
from omni_proxy.flow.settings import BandSettings, FlowSettings
from omni_proxy.flow.ticket import Ticket


@dataclass
class FakeTimers:
    """Timers fire when `advance` passes them; `call_soon` is the loop's own."""

    now: float = 100.0
    pending: list[tuple[float, asyncio.TimerHandle]] = field(default_factory=list)

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, (), asyncio.get_running_loop())
        self.pending.append((when, handle))
        return handle

    def call_soon(self, callback: Callable[[], object]) -> asyncio.Handle:
        return asyncio.get_running_loop().call_soon(callback)

    @property
    def live(self) -> list[tuple[float, asyncio.TimerHandle]]:
        return [(when, handle) for when, handle in self.pending if not handle.cancelled()]

    async def advance(self, ms: float) -> None:
        until = self.now + ms / 1e3
        while due := [item for item in self.live if item[0] <= until + 1e-9]:
            when, handle = min(due, key=lambda item: item[0])
            self.pending.remove((when, handle))
            self.now = max(self.now, when)
            handle._run()
            await settle()
        self.now = until
        await settle()


async def settle() -> None:
    for _ in range(150):
        await asyncio.sleep(0)


@dataclass
class ScriptedRoom:
    """One worker: `free` places, then busy until `busy_until_s`."""

    timers: FakeTimers
    free: int = 0
    busy_until_s: float = 100.0
    fixed_ms: float | None = None
    apart: dict[str, float] = field(default_factory=dict)
    """Milliseconds until there is room for an adapter."""
    are_together: bool = False
    """The same workers serve all of them."""
    asked: int = 0

    def room_in_ms(self, ticket: Ticket) -> float:
        self.asked += 1
        if ticket.adapter in self.apart:
            return self.apart[ticket.adapter]
        if self.fixed_ms is not None:
            return self.fixed_ms
        return 0.0 if self.free > 0 else max(1.0, (self.busy_until_s - self.timers.now) * 1e3)

    def drain_ms(self, adapter: str = "") -> float:
        if adapter in self.apart:
            return self.apart[adapter]
        if self.fixed_ms is not None:
            return self.fixed_ms
        return 0.0 if self.free > 0 else max(0.0, (self.busy_until_s - self.timers.now) * 1e3)

    def takers(self, adapter: str) -> str:
        if adapter not in self.apart:
            return ""
        return "together" if self.are_together and math.isfinite(self.apart[adapter]) else adapter


class Bench:
    """A gate, and clients that take a place of the room when it is their turn."""

    def __init__(self, room: dict[str, float] | None = None, **settings: object) -> None:
        self.timers = FakeTimers()
        self.room = ScriptedRoom(self.timers, **(room or {}))  # type: ignore[arg-type]
        self.registry = CollectorRegistry()
        self.queue = FlowQueue(FlowSettings.model_validate(settings))
        self.gate = FlowGate(self.queue, self.room, FlowMetrics(self.registry), self.timers)
        self.order: list[str] = []
        self.turns: dict[str, Turn] = {}
        self.tasks: dict[str, asyncio.Task[Turn]] = {}

    def ticket(self, name: str, tenant: str = "t", *, deadline_ms: float = 1e9, **fields: object) -> Ticket:
        return Ticket(name, self.timers.now, self.timers.now + deadline_ms / 1e3, tenant, **fields)  # type: ignore[arg-type]

    async def ask(self, name: str, tenant: str = "t", **fields: object) -> asyncio.Task[Turn]:
        """Start a client and let it come to rest."""
        self.tasks[name] = asyncio.create_task(self._client(self.ticket(name, tenant, **fields)))  # type: ignore[arg-type]
        await settle()
        return self.tasks[name]

    async def free(self, places: int = 1) -> None:
        self.room.free += places
        self.gate.poke()
        await settle()

    async def _client(self, ticket: Ticket) -> Turn:
        turn = await self.gate.turn(ticket)
        self.room.free -= 1
        self.order.append(ticket.request_id)
        self.turns[ticket.request_id] = turn
        return turn

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def bench(room: dict[str, float] | None = None, **settings: object) -> AsyncIterator[Bench]:
    made = Bench(room, **settings)
    try:
        yield made
    finally:
        for task in made.tasks.values():
            task.cancel()
            with suppress(asyncio.CancelledError, OmniError):
                await task


def error_of(task: asyncio.Task[Turn]) -> OmniError:
    error = task.exception()
    assert isinstance(error, OmniError)
    return error


async def test_with_room_and_nobody_waiting_there_is_no_switch_of_tasks():
    async with bench({"free": 1}) as b:
        coroutine = b.gate.turn(b.ticket("r"))
        with pytest.raises(StopIteration) as returned:
            coroutine.send(None)
        turn = returned.value.value
        assert turn.reason is Release.ROOM and turn.waited_ms == 0
        assert b.metric("omni_proxy_flow_hold_seconds_count") == 1


async def test_places_are_filled_one_by_one_and_no_further():
    """Twenty come at once to three places: the room is judged anew after each has taken its own."""
    async with bench() as b:
        for number in range(20):
            await b.ask(f"{number}")
        await b.free(3)
        assert b.order == ["0", "1", "2"] and b.room.free == 0
        assert b.metric("omni_proxy_flow_waiting", band="default") == 17


async def test_a_newcomer_does_not_pass_one_whose_release_is_on_its_way():
    async with bench() as b:
        await b.ask("first")
        b.room.free = 1
        b.gate.poke()
        late = asyncio.create_task(b._client(b.ticket("late")))
        b.tasks["late"] = late
        await settle()
        assert b.order == ["first"] and not late.done()


async def test_the_turn_comes_at_the_predicted_boundary():
    async with bench({"busy_until_s": 100.03}) as b:
        waiting = await b.ask("r")
        await b.timers.advance(29)
        assert not waiting.done()
        b.room.free = 1
        await b.timers.advance(1)
        assert waiting.result().reason is Release.BOUNDARY
        assert waiting.result().waited_ms == pytest.approx(30)
        assert not b.timers.live


async def test_a_timer_and_a_poke_together_release_no_more_than_there_is_room_for():
    async with bench({"busy_until_s": 100.03}) as b:
        for name in "ab":
            await b.ask(name)
        b.room.free = 1
        b.gate.poke()
        _, timer = b.timers.live[0]
        timer._run()
        await settle()
        assert b.order == ["a"] and b.room.free == 0


async def test_a_prediction_that_was_wrong_is_looked_at_again():
    async with bench({"fixed_ms": 900}) as b:
        waiting = await b.ask("r")
        await b.timers.advance(20)
        b.room.fixed_ms = 0
        await b.timers.advance(30)
        assert waiting.result().reason is Release.BOUNDARY or waiting.result().reason is Release.ROOM
        assert waiting.result().waited_ms == pytest.approx(50)


async def test_an_answer_that_comes_early_lets_the_next_one_go():
    async with bench({"fixed_ms": 900}) as b:
        waiting = await b.ask("r")
        b.room.fixed_ms = 0
        b.gate.poke()
        await settle()
        assert waiting.result().reason is Release.ROOM


async def test_a_head_is_held_no_longer_than_max_hold():
    """One release per max_hold when the predictor never sees room; the order stays ours."""
    async with bench({"fixed_ms": 1e6}, max_hold_ms=200, order="fcfs") as b:
        for name in "abc":
            await b.ask(name)
        await b.timers.advance(199)
        assert b.order == []
        await b.timers.advance(1)
        assert b.order == ["a"]
        await b.timers.advance(400)
        assert b.order == ["a", "b", "c"]
        assert {t.reason for t in b.turns.values()} == {Release.MAX_HOLD}


async def test_a_head_goes_at_its_latest_start_but_not_all_of_them():
    async with bench({"fixed_ms": 1e6}, max_hold_ms=1000) as b:
        for name in "abc":
            await b.ask(name, ttft_slo_ms=300, prefill_ms=100)
        await b.timers.advance(194)
        assert b.order == []
        await b.timers.advance(2)
        assert b.order == ["a"] and b.turns["a"].reason is Release.SLO
        await b.timers.advance(100)
        assert b.order == ["a"]


async def test_without_a_prediction_nobody_waits():
    async with bench({"fixed_ms": math.nan}) as b:
        assert (await b.ask("r")).result().reason is Release.NO_PREDICTION


async def test_bands_and_tenants_keep_their_order_at_the_gate():
    async with bench() as b:
        for number in range(6):
            await b.ask(f"flood{number}", "flood")
        await b.ask("one", "quiet")
        await b.ask("vip", "flood", priority=10)
        await b.free(1)
        await b.free(2)
        assert b.order == ["vip", "flood0", "one"]


async def test_a_band_that_holds_back_waits_for_a_worker_with_less_work():
    bands = (BandSettings(priority=0, name="all"), BandSettings(priority=-1, name="spare", hold_back=0.5))
    async with bench({"busy_until_s": 100.1}, lookahead_ms=80, bands=bands, sheddable_shed_factor=None) as b:
        spare = await b.ask("spare", priority=-1)
        await b.timers.advance(59)
        assert not spare.done()
        b.room.free = 1
        b.room.drain_ms = lambda adapter="": 41.0  # type: ignore[method-assign]
        b.gate.poke()
        await settle()
        assert not spare.done() and b.metric("omni_proxy_flow_saturation") == pytest.approx(41 / 80)
        assert (await b.ask("normal")).done() is True
        b.room.free, b.room.drain_ms = 1, lambda adapter="": 40.0  # type: ignore[method-assign]
        b.gate.poke()
        await settle()
        assert spare.done()


async def test_a_cancelled_wait_frees_its_place_and_its_bytes():
    async with bench(max_requests=1) as b:
        waiting = await b.ask("gone", size_bytes=10)
        assert error_of(await b.ask("refused")).reason == "queue_full"
        waiting.cancel()
        await settle()
        assert waiting.cancelled() and len(b.queue) == 0 and b.queue.size_bytes == 0
        await b.ask("next")
        await b.free(1)
        assert b.order == ["next"]
        assert b.metric("omni_proxy_dropped_total", reason="cancelled") == 1


async def test_cancelled_in_the_moment_of_release_the_place_goes_to_the_next():
    async with bench(fairness="least_attained_service") as b:
        first = await b.ask("first", "a", output_tokens=1000)
        await b.ask("second", "b")
        b.room.free = 1
        b.gate._pass()  # the future has its result, its task has not run
        first.cancel()
        await settle()
        assert first.cancelled() and b.order == ["second"]
        await b.ask("b again", "b")
        await b.ask("a again", "a")
        await b.free(1)
        assert b.order[-1] == "a again"  # the turn not taken was given back


async def test_who_goes_away_just_before_the_release_is_not_charged():
    async with bench() as b:
        gone = await b.ask("gone", "a", output_tokens=1000)
        b.room.free = 1
        gone.cancel()
        b.gate._pass()  # its task has not run
        await settle()
        b.room.free = 0
        await b.ask("a", "a")
        await b.ask("b", "b")
        await b.free(2)
        assert b.order == ["a", "b"]


def test_nobodys_time_is_no_pace() -> None:
    pace = Pace()
    for number in range(20):
        pace.released(number * 0.02, was_backlog=True)
    pace.rested()  # who waited has left
    pace.released(3600.0, was_backlog=True)
    assert pace.gap_ms(7.0) == pytest.approx(20)


def test_the_pace_follows_the_queue():
    pace = Pace()
    assert pace.gap_ms(7.0) == 7.0
    for number in range(50):
        pace.released(number * 0.1, was_backlog=True)
    assert pace.gap_ms(7.0) == pytest.approx(100)
    for number in range(50):
        pace.released(5 + number, was_backlog=True)
    assert pace.gap_ms(7.0) == pytest.approx(1000, rel=0.01)
    pace.released(100, was_backlog=False)
    before = pace.gap_ms(7.0)
    pace.released(500, was_backlog=True)
    assert pace.gap_ms(7.0) == before, "time in which nobody waited is no pace"


async def test_too_long_a_wait_is_429_with_the_time_until_the_queue_is_empty():
    async with bench({"busy_until_s": 107}, ttl_s=5, max_hold_ms=1e5) as b:
        waiting = await b.ask("r", prefill_ms=10)
        await b.timers.advance(5000)
        error = error_of(waiting)
        assert isinstance(error, ResourceExhausted) and error.reason == "queue_ttl"
        assert error.retry_after_s == pytest.approx(2.0)


async def test_the_requests_own_deadline_is_504():
    async with bench({"fixed_ms": 1e6}, max_hold_ms=1e5) as b:
        waiting = await b.ask("r", deadline_ms=300)
        await b.timers.advance(300)
        assert isinstance(error_of(waiting), DeadlineExceeded)


async def test_retry_after_follows_the_pace_of_the_queue():
    """Ten releases 200 ms apart, then 20 wait: 20 x 200 ms and what is in flight."""
    async with bench({"busy_until_s": 100}, max_requests=20, max_hold_ms=1e6, ttl_s=300) as b:
        for number in range(20):
            await b.ask(f"{number}")
        for number in range(10):
            b.timers.now += 0.2
            await b.free(1)
            await b.ask(f"more{number}")
        b.room.busy_until_s = b.timers.now + 1.0
        error = error_of(await b.ask("refused"))
        assert error.reason == "queue_full"
        assert error.retry_after_s == pytest.approx(20 * 0.2 + 1.0, rel=0.02)
        assert b.metric("omni_proxy_dropped_total", reason="queue_full") == 1


async def test_sheddable_requests_are_refused_when_their_slo_is_out_of_reach():
    async with bench({"busy_until_s": 100.5}) as b:
        error = error_of(await b.ask("shed", priority=-10, ttft_slo_ms=400, prefill_ms=50))
        assert error.reason == "slo_out_of_reach" and error.retry_after_s == pytest.approx(0.5)
        assert not (await b.ask("kept", priority=-10, ttft_slo_ms=600, prefill_ms=50)).done()
        assert not (await b.ask("normal", ttft_slo_ms=400, prefill_ms=50)).done()


async def test_normal_requests_are_shed_where_the_configuration_says_so():
    async with bench({"busy_until_s": 101}, shed_factor=2.0) as b:
        assert not (await b.ask("late", ttft_slo_ms=600)).done()
        assert error_of(await b.ask("hopeless", ttft_slo_ms=300)).reason == "slo_out_of_reach"


async def test_a_displaced_request_learns_it_at_once():
    async with bench(
        max_requests=1, bands=(BandSettings(priority=0, name="a"), BandSettings(priority=-1, name="b"))
    ) as b:
        low = await b.ask("low", priority=-1)
        await b.ask("high")
        assert error_of(low).reason == "displaced" and len(b.queue) == 1


async def test_no_worker_is_503_at_once_or_after_a_wait():
    async with bench({"fixed_ms": math.inf}, worker_wait_ms=0) as b:
        error = error_of(await b.ask("r"))
        assert isinstance(error, Unavailable) and error.reason == "no_decode_worker" and error.retry_after_s
    async with bench({"fixed_ms": math.inf}, worker_wait_ms=3000) as b:
        patient = await b.ask("patient")
        await b.timers.advance(2999)
        assert not patient.done()
        late = await b.ask("late")
        await b.timers.advance(1)
        assert error_of(patient).reason == error_of(late).reason == "no_decode_worker"


async def test_who_asks_long_after_the_last_worker_went_is_refused_at_once():
    async with bench({"fixed_ms": math.inf}, worker_wait_ms=1000) as b:
        b.gate.workers_changed()
        await settle()
        await b.timers.advance(1000)
        assert error_of(await b.ask("late")).reason == "no_decode_worker"
        b.room.fixed_ms = 0
        b.gate.workers_changed()
        assert (await b.ask("served")).done()
        b.room.fixed_ms = math.inf
        b.gate.workers_changed()
        await settle()
        assert not (await b.ask("just gone")).done()


async def test_a_prediction_that_fails_as_workers_come_and_go_reaches_nobody():
    """Who tells the gate is a membership, which would end by it."""
    async with bench({"fixed_ms": 0}) as b:
        b.room.drain_ms = lambda adapter="": [].pop()  # type: ignore[method-assign]
        b.gate.workers_changed()
        await settle()
        assert (await b.ask("served")).done()


async def test_who_waits_outlasts_a_short_absence_of_workers():
    async with bench({"fixed_ms": 50}, max_hold_ms=1000) as b:
        waiting = await b.ask("r")
        b.room.fixed_ms = math.inf
        await b.timers.advance(900)
        assert not waiting.done()
        b.room.fixed_ms = 0
        b.gate.poke()
        await settle()
        assert waiting.done() and waiting.exception() is None


# Adapters


async def test_who_waits_for_an_adapter_is_passed_over_while_others_have_room():
    async with bench({"free": 4}, order="fcfs") as b:
        b.room.apart = {"x": 500.0}
        for name in "abcd":
            await b.ask(name, adapter="x" if name in "ac" else "")
        assert b.order == ["b", "d"]
        b.room.apart.clear()
        b.gate.poke()
        await settle()
        assert b.order == ["b", "d", "a", "c"]


async def test_where_nobody_has_room_an_adapter_keeps_its_turn():
    """So do those of other adapters behind it."""
    async with bench(order="fcfs") as b:
        b.room.apart = {"x": 500.0}
        for name, adapter in zip("abcd", ["x", "", "y", "x"], strict=True):
            await b.ask(name, adapter=adapter)
        b.room.apart["y"] = 0.0
        b.gate.poke()
        await settle()
        assert b.order == []
        b.room.apart["x"] = 0.0
        await b.free(1)
        assert b.order[0] == "a"


async def test_a_higher_band_that_waits_for_its_adapter_lets_lower_ones_go():
    async with bench({"free": 1}) as b:
        b.room.apart = {"x": 500.0}
        await b.ask("vip", priority=10, adapter="x")
        await b.ask("one")
        assert b.order == ["one"]


async def test_an_adapter_is_held_no_longer_than_max_hold_while_others_go():
    async with bench({"free": 100}, max_hold_ms=200, order="fcfs") as b:
        b.room.apart = {"x": 1e6}
        for name in ("x1", "x2"):
            await b.ask(name, adapter="x")
        for number in range(7):
            await b.timers.advance(30)
            await b.ask(f"{number}")
        assert b.turns["x1"].reason is Release.MAX_HOLD and b.turns["x1"].waited_ms == pytest.approx(200)
        assert b.order == [*"012345", "x1", "6"]
        await b.timers.advance(200)
        assert b.turns["x2"].reason is Release.MAX_HOLD


@pytest.mark.parametrize(("room_ms", "order"), [(500.0, []), (math.inf, ["base"])])
async def test_a_look_asks_of_a_bounded_number_of_adapters(room_ms, order):
    async with bench({"free": 1}) as b:
        b.room.apart = {f"x{number}": room_ms for number in range(40)}
        for name in b.room.apart:
            await b.ask(name, name, priority=10, adapter=name)
        before = b.room.asked
        await b.ask("base")
        assert b.order == order and b.room.asked - before <= (2 * 42 if order else 20)


async def test_many_adapters_that_wait_for_the_same_workers_hold_up_nobody_else():
    async with bench({"free": 100}, max_hold_ms=200, order="fcfs") as b:
        b.room.apart, b.room.are_together = {f"x{number}": 1e6 for number in range(200)}, True
        for name in b.room.apart:
            await b.ask(name, adapter=name)
        before = b.room.asked
        await b.ask("base")
        assert b.order == ["base"] and b.room.asked - before < 10
        await b.timers.advance(210)
        await b.ask("next")
        await b.timers.advance(100)
        # One of all of them goes after max_hold, not one of each.
        assert b.order == ["base", "x0", "next"]


@pytest.mark.parametrize("is_left", [False, True], ids=["one stays", "all leave"])
async def test_a_hold_ends_with_the_last_who_waits_for_those_workers(is_left):
    """Beside a backlog of others, one of whom goes every 100 ms."""
    async with bench({"busy_until_s": 1e6}, max_hold_ms=300, order="fcfs") as b:
        b.room.apart, b.room.are_together = {"x": 1e6, "y": 1e6}, True

        async def one_goes(number: int) -> None:
            await b.ask(f"{number}")
            await b.free(1)
            await b.timers.advance(100)

        await b.ask("base")
        first, second = await b.ask("x", adapter="x"), await b.ask("y", adapter="y")
        await one_goes(0)
        first.cancel()
        if is_left:
            second.cancel()
        await one_goes(1)
        await one_goes(2)
        await b.ask("x again", adapter="x")
        await one_goes(3)
        assert "x again" not in b.order, "it has waited for 100 ms"
        assert ("y" in b.order) is not is_left


async def test_who_comes_after_an_adapter_that_waits_long_is_held_as_long_as_anybody():
    async with bench({"free": 1}, max_hold_ms=200) as b:
        b.room.apart = {"x": 1e6}
        await b.ask("x", adapter="x")
        await b.timers.advance(190)
        b.room.free = 0
        b.room.busy_until_s = 1e6
        await b.ask("late")
        await b.timers.advance(180)
        assert b.order == ["x"]


async def test_an_adapter_that_nobody_serves_is_refused_and_holds_up_nobody():
    async with bench({"free": 100}, max_hold_ms=300, worker_wait_ms=500) as b:
        b.room.apart = {"x": math.inf, "y": 0.0}
        lost = [await b.ask("x1", adapter="x")]
        await b.timers.advance(400)
        lost.append(await b.ask("x2", adapter="x"))
        await b.ask("base")
        await b.ask("other", adapter="y")
        assert b.order == ["base", "other"] and not any(task.done() for task in lost)
        await b.timers.advance(100)
        for task in lost:
            error = error_of(task)
            assert isinstance(error, Unavailable) and error.reason == "no_adapter" and error.retry_after_s == 1
            assert error.message == "no decode worker that serves the adapter 'x' takes work"
        assert (await b.ask("x3", adapter="x")).done(), "refused at once from then on"
        assert b.metric("omni_proxy_dropped_total", reason="no_adapter") == 3
        b.room.apart["x"] = 0.0
        assert (await b.ask("x4", adapter="x")).result().reason is Release.ROOM
        b.room.apart["x"] = math.inf
        again = await b.ask("x5", adapter="x")
        await b.timers.advance(400)
        assert not again.done(), "its time counts anew"
        b.room.apart["x"] = 0.0
        b.gate.workers_changed()
        await settle()
        assert again.result().reason in (Release.ROOM, Release.BOUNDARY)


async def test_without_any_worker_an_adapter_is_not_the_reason():
    async with bench({"fixed_ms": math.inf}, max_hold_ms=100, worker_wait_ms=100) as b:
        b.room.apart = {"x": math.inf}
        tasks = [await b.ask(name, adapter=name) for name in ("x", "")]
        await b.timers.advance(100)
        assert {error_of(task).reason for task in tasks} == {"no_decode_worker"}


async def test_a_prediction_that_raises_for_an_adapter_ends_nobody_else():
    async with bench({"free": 1}) as b:
        b.room.apart = {"x": 500.0, "y": 500.0}
        waiting, broken = [await b.ask(name, adapter=name) for name in "xy"]
        b.room.apart["y"] = "unpredictable"  # type: ignore[assignment]
        b.gate.poke()
        await settle()
        assert isinstance(error_of(broken), Internal) and not waiting.done()


async def test_reconfiguring_loses_nobody():
    async with bench(order="fcfs") as b:
        for number in range(50):
            await b.ask(f"{number}", f"t{number % 3}", priority=number % 2, uncached_tokens=number)
        bands = (BandSettings(priority=1, name="odd"), BandSettings(priority=0, name="even"))
        b.gate.reconfigure(FlowSettings(order="lpt", fairness="none", bands=bands, max_requests=5))
        await b.free(50)
        assert b.order == [str(n) for n in (*range(49, 0, -2), *range(48, -1, -2))]
        assert b.metric("omni_proxy_flow_waiting", band="odd") == 0


def _no_key(ticket: Ticket) -> tuple[float, ...]:
    raise ValueError("a third party's order")


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(Order(_no_key), id="raises"),
        pytest.param(Order(lambda t: (None,)), id="no number"),  # type: ignore[arg-type,return-value]
        pytest.param(Order(lambda t: (0.0,), hopeless_from_s=lambda t: 1 / 0), id="the instant raises"),
    ],
)
async def test_an_order_that_raises_strands_nobody(monkeypatch, broken):
    """Neither those who wait when it is configured nor, where nobody did, those who come afterwards."""
    monkeypatch.setattr(queue_module, "known_orders", lambda: {**ORDERS, "broken": broken})
    wrong = FlowSettings.model_construct(**dict(FlowSettings(max_requests=5)) | {"order": "broken"})
    async with bench(order="fcfs") as b:
        for number in range(20):
            await b.ask(f"{number}")
        with pytest.raises((ValueError, TypeError, ZeroDivisionError)):
            b.gate.reconfigure(wrong)
        assert b.queue.settings.order == "fcfs"
        await b.free(20)
        assert b.order == [f"{number}" for number in range(20)]
        b.room.free = 0
        b.gate.reconfigure(wrong)
        for number in range(6):
            await b.ask(f"refused{number}")
            refused = b.tasks.pop(f"refused{number}").exception()
            assert isinstance(refused, ValueError | TypeError | ZeroDivisionError)
        assert len(b.queue) == b.queue.size_bytes == 0
        b.gate.reconfigure(FlowSettings())
        await b.ask("late")
        await b.free(1)
        assert b.order[-1] == "late"


async def test_a_prediction_that_raises_ends_the_head_and_leaves_the_others_a_look():
    async with bench(order="fcfs") as b:
        first, second = [await b.ask(name) for name in ("first", "second")]

        def raises(ticket: Ticket) -> float:
            del b.room.room_in_ms  # type: ignore[method-assign]
            raise ZeroDivisionError

        b.room.room_in_ms = raises  # type: ignore[method-assign]
        await b.free(1)
        assert isinstance(first.exception(), Internal) and second.done() and b.order == ["second"]


async def test_service_is_settled_once_with_what_was_generated():
    async with bench({"free": 2}) as b:
        short, long = [(await b.ask(n, n, output_tokens=100)).result() for n in ("short", "long")]
        short.ended(10)
        short.ended(10**6)
        long.ended(100)
        await b.ask("l", "long")
        await b.ask("s", "short")
        await b.free(1)
        assert b.order[-1] == "s"


async def test_the_gate_asks_the_room_a_bounded_number_of_times():
    """Each release looks once; a queue of hundreds is not gone through."""
    async with bench() as b:
        for number in range(300):
            await b.ask(f"{number}")
        before = b.room.asked
        await b.free(10)
        assert len(b.order) == 10 and b.room.asked - before <= 12


@pytest.mark.parametrize("seed", range(3))
async def test_a_storm_of_aborts_leaks_nothing(seed):
    """Clients come, go away and are released in any order; at the end nothing waits and every place was used once."""
    rng = random.Random(seed)
    async with bench(max_requests=200, ttl_s=0.5, max_hold_ms=100) as b:
        for number in range(200):
            match rng.randrange(6):
                case 0 | 1 | 2:
                    tenant, priority = f"t{rng.randrange(4)}", rng.choice([0, 0, 10, -10])
                    adapter, slo_ms = rng.choice(["", "", "x", "y"]), rng.choice([None, 50.0])
                    await b.ask(f"{number}", tenant, priority=priority, adapter=adapter, ttft_slo_ms=slo_ms)
                case 3 if rng.random() < 0.3:
                    b.room.apart = {"x": rng.choice([0.0, 30.0, math.inf])}
                    b.gate.workers_changed()
                case 3 if b.tasks:
                    b.tasks[rng.choice(list(b.tasks))].cancel()
                case 4:
                    b.room.free += rng.randrange(3)
                    b.gate.poke()
                case _:
                    await b.timers.advance(rng.choice([1, 20, 60]))
        await b.timers.advance(600)
        assert len(b.queue) == 0 and b.queue.size_bytes == 0 and b.gate.waiting_ms == 0
        assert all(task.done() for task in b.tasks.values()) and not b.timers.live
        ended = sum(t.cancelled() or t.exception() is not None or t.result() is b.turns[n] for n, t in b.tasks.items())
        assert ended == len(b.tasks) and len(b.order) == len(set(b.order))
