"""The fleet's columns follow its members: slots, reports of load, views."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from omni_common.errors import Unavailable
from omni_common.prefix_index import PrefixIndex
from omni_proxy.fleet import Fleet
from omni_proxy.flow.ticket import Ticket
from omni_proxy.metrics import PrefixMetrics
from omni_proxy.replica import Replica
from omni_proxy.room import FleetRoom, least_work
from omni_proxy.scheduling.decision import eligible
from omni_proxy.scheduling.forecast import LoadCost
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.times import Priors, Seen, prompt_features
from omni_proxy.scheduling.view import FleetView
from omni_proxy.worker import GROUP_LABEL, Load, Member, Role, Worker


class Port:
    ready = True


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Fixture:
    """A fleet on a clock of its own, and what it says of step times."""

    def __init__(self) -> None:
        self.clock, self.seen = Clock(), list[Seen]()
        replica = Replica(lambda: PrefixIndex(max_blocks=16), 1.0, PrefixMetrics(CollectorRegistry()))
        costs = dict.fromkeys(("host", "disk", "remote"), LoadCost(0.0, 0.1))
        self.fleet = Fleet("m", replica, costs, now=self.clock, saw_step=self.seen.append)

    def put(self, name: str, role: Role = Role.BOTH, epoch: int = 1, **of: Any) -> Member:
        port: Any = Port()
        values = {"max_model_len": 1000, "max_num_seqs": 2, "engine": "e", "kv_connector": "c"}
        worker = Worker(name, "", role, epoch, **{"model": "m", "block_size": 16} | values | of)
        member = Member(worker, port, port, is_reachable=True)
        self.fleet.put(member)
        return member

    def view(self, prompt_tokens: int = 100) -> FleetView:
        return self.fleet.view(self.fleet.forecast(lambda size: b""), prompt_tokens, 10)


@pytest.fixture
async def made() -> Fixture:
    return Fixture()


async def test_a_worker_that_left_with_work_keeps_its_slot_until_that_is_over(made: Fixture) -> None:
    fleet = made.fleet
    made.put("busy")
    slot = fleet.columns.slot("busy")
    with fleet.ledger.charge("busy", (1000, 0)):
        fleet.drop("busy")
        made.put("a")
        assert fleet.columns.slot("a") != slot
        assert fleet.ledger.of("busy").requests == 1
        fleet.drop("a")
        assert fleet.ledger.of("busy").requests == 1
    made.put("b")
    fleet.drop("b")
    assert fleet.columns.get("busy") is None
    assert fleet.ledger.total_requests == 0


async def test_a_worker_that_returns_in_time_has_its_account_again(made: Fixture) -> None:
    fleet = made.fleet
    made.put("busy")
    with fleet.ledger.charge("busy", (1000, 0)):
        fleet.drop("busy")
        made.put("busy", epoch=2)
    made.put("other")
    fleet.drop("other")
    assert fleet.columns.get("busy") is not None
    assert made.view().ids == ("busy",)


async def test_thousands_of_short_lived_workers_take_no_room(made: Fixture) -> None:
    for number in range(2000):
        made.put(f"w{number}")
        with made.fleet.ledger.charge(f"w{number}", (10, 0)):
            made.fleet.drop(f"w{number}")
    assert made.fleet.columns.capacity == 16


async def test_the_view_is_of_those_that_take_work_in_any_order_of_slots(made: Fixture) -> None:
    members = [made.put(f"w{number}") for number in range(20)]
    for number, member in enumerate(members):
        member.load = Load(running=number, waiting=1, kv_usage=number / 100, others_sequences=3, context_tokens=number)
    for number in (0, 3, 18):
        made.fleet.drop(f"w{number}")
    members[5].is_draining = True
    made.fleet.signal()
    made.put("late").load = Load(running=77)
    made.clock.now_s += 2.5
    view = made.view()
    rows = dict(zip(view.ids, view.running.tolist(), strict=True))
    expected = {f"w{n}": n for n in range(20) if n not in (0, 3, 5, 18)} | {"late": 77}
    assert rows == expected
    assert view.stats_age_s == pytest.approx(np.full(len(view), 2.5))
    assert view.sequences.tolist() == [3] * 16 + [0]
    with made.fleet.ledger.charge("late", (60, 40), 9):
        before, view = view, made.view()
        row = view.ids.index("late")
        own = (view.own_requests[row], view.own_prefills[row], view.own_uncached_tokens[row])
        assert own == (1, 1, 60)
        assert (view.own_output_tokens[row], view.dispatched[row]) == (9, 1)
        assert before.own_requests[row] == 0, "a view does not change under whoever looks at it"
        assert view.times.queue_ms[row] > 0


async def test_a_worker_of_another_model_counts_for_nothing(made: Fixture) -> None:
    fleet = made.fleet
    made.put("a")
    other = made.put("b", model="other", max_model_len=10)
    assert fleet.max_model_len == 1000
    confidence = fleet.times.confidence()
    for steps in (10, 20, 30):
        other.load = Load(running=1, steps=steps, busy_ms=9e3 * steps, prompts=steps, prompt_tokens=1, prompt_busy_ms=1)
    assert (made.seen, fleet.times.confidence()) == ([], confidence)
    made.put("a", epoch=2, model="other")
    assert fleet.max_model_len is None
    assert made.view().ids == ()


@pytest.mark.parametrize(
    ("of", "can"),
    [
        pytest.param({}, True, id="alike"),
        pytest.param({"block_size": 32}, False, id="another block size"),
        pytest.param({"kv_connector": "other"}, False, id="another connector"),
        pytest.param({"kv_connector": ""}, False, id="no connector"),
        pytest.param({"labels": {GROUP_LABEL: "g2"}}, False, id="another group"),
        pytest.param({"labels": {GROUP_LABEL: "g1"}}, True, id="the same group"),
    ],
)
async def test_who_can_pull_whose_blocks(made: Fixture, of: dict[str, Any], can: bool) -> None:
    holder = made.put("p", Role.PREFILL, labels={GROUP_LABEL: "g1"} if "labels" in of else {})
    reader = made.put("d", Role.DECODE, **of)
    view = made.view()
    rows = [np.array([view.ids.index(name)]) for name in "pd"]
    assert view.can_pair(*rows).item() is can
    assert reader.worker.can_pull_from(holder.worker) is can
    assert not holder.worker.can_pull_from(holder.worker)


async def test_a_forecast_of_other_workers_is_refused(made: Fixture) -> None:
    made.put("a")
    found = made.fleet.forecast(lambda size: b"")
    assert made.fleet.is_current(found)
    made.put("b")
    assert not made.fleet.is_current(found)
    with pytest.raises(ValueError, match="other workers"):
        made.fleet.view(found, 10, 10)


async def test_steps_are_learned_from_what_two_reports_differ_by(made: Fixture) -> None:
    member = made.put("w")
    # Steps before the first report may have been of any load.
    load = member.load = Load(running=4, context_tokens=4000, steps=1000, busy_ms=99_000.0)
    assert made.seen == []
    for number in range(100):
        context, step_ms = ((4000, 20.0), (60_000, 70.0))[number // 5 % 2]
        busy_ms = load.busy_ms + 10 * step_ms
        load = member.load = Load(running=4, context_tokens=context, steps=load.steps + 10, busy_ms=busy_ms)
    assert [seen.seen_ms for seen in made.seen] == pytest.approx(([20.0] * 5 + [70.0] * 5) * 10)
    # The first report of a stretch is of both loads.
    pure = [seen for number, seen in enumerate(made.seen) if number % 5 and number > 50]
    assert sorted(seen.error for seen in pure)[len(pure) // 2] < 0.1
    member.load = load
    assert len(made.seen) == 100, "no step, nothing to learn"


async def test_who_has_gone_idle_is_not_slow_for_the_prompts_of_its_last_steps(made: Fixture) -> None:
    """Nothing would show that it is not: a worker that looks slow gets no work."""
    member = made.put("w")
    load = Load()
    for number in range(200):
        prompts = 500 * (number // 10 % 2)
        member.load = load = Load(
            running=1,
            steps=load.steps + 10,
            busy_ms=load.busy_ms + 10 * (5 + 0.4 * prompts),
            computed_prompt_tokens=load.computed_prompt_tokens + 10 * prompts,
        )
    assert made.view().times.step_ms[0] > 100
    for _ in range(10):
        member.load = replace(load, running=0)
    assert made.view().times.step_ms[0] < 8


async def test_the_steps_of_who_does_not_decode_teach_nothing(made: Fixture) -> None:
    member = made.put("p", Role.PREFILL)
    for number in range(1, 30):
        member.load = Load(running=1, steps=10 * number, busy_ms=9000.0 * number)
    assert made.seen == []
    made.put("d", Role.DECODE)
    assert made.view().times.step_ms[1] == pytest.approx(Priors().step[0] + Priors().step[1], rel=0.4)


async def test_a_new_proxy_knows_from_a_workers_life_what_its_prompts_take(made: Fixture) -> None:
    slow, quick = made.put("slow", Role.PREFILL), made.put("quick", Role.PREFILL)
    other = made.put("other", Role.PREFILL, engine="of another kind")
    slow.load = Load(prompts=400, prompt_tokens=400_000, prompt_busy_ms=400_000.0)
    newcomer = made.put("new", Role.PREFILL)
    quick.load = Load(prompts=10, prompt_tokens=10_000, prompt_busy_ms=125.0)
    newcomer.load = other.load = Load(running=1)
    view = made.view(prompt_tokens=1000)
    expected = np.dot(Priors().prompt, (1.0, 1000.0, 500.0))
    said = dict(zip(view.ids, view.times.prefill_ms.tolist(), strict=True))
    assert {name: said[name] for name in ("slow", "quick", "other")} == pytest.approx(
        {"slow": 1000.0, "quick": 12.5, "other": expected}, rel=0.1
    )
    assert 12.0 < said["new"] < 1000.0, "as its peers"


async def test_a_life_before_says_nothing_that_was_not_seen_better(made: Fixture) -> None:
    member = made.put("w", Role.PREFILL)
    slot = made.fleet.columns.slot("w")
    for _ in range(20):
        made.fleet.times.saw_prompt(slot, prompt_features(1000, 0), 50.0)
    member.load = Load(prompts=5, prompt_tokens=5000, prompt_busy_ms=9e9)
    assert made.view(prompt_tokens=1000).times.prefill_ms[0] == pytest.approx(50.0, rel=0.02)


async def test_an_earlier_epoch_is_not_heard_any_more(made: Fixture) -> None:
    earlier = made.put("w")
    earlier.load = Load(running=9, steps=5000, busy_ms=1e5)
    made.put("w", epoch=2).load = Load(running=1, steps=3, busy_ms=60.0)
    earlier.load = Load(running=9, steps=5001, busy_ms=1e6)
    assert made.view().running.tolist() == [1]
    assert made.seen == []


async def test_room_is_where_the_least_loaded_worker_is_soon_done(made: Fixture) -> None:
    room = FleetRoom(made.fleet, lookahead_ms=20.0)
    ticket = Ticket("r", 0.0, 100.0, prompt_tokens=1000, output_tokens=10)
    assert (room.room_in_ms(ticket), room.drain_ms()) == (np.inf, np.inf)
    made.put("p", Role.PREFILL)
    assert room.room_in_ms(ticket) == np.inf, "nobody decodes"
    decode = made.put("d", Role.DECODE)
    assert room.room_in_ms(ticket) == 0
    takes_ms = float(np.dot(Priors().prompt, (1.0, 1000.0, 500.0)))
    made.fleet.times.saw_prompt(made.fleet.columns.slot("p"), prompt_features(1000, 0), takes_ms)
    with made.fleet.ledger.charge("p", (1000, 0)):
        assert room.drain_ms() == pytest.approx(takes_ms)
        assert room.room_in_ms(ticket) == pytest.approx(takes_ms - 20.0)
        assert not room.is_short_of_decode(ticket), "prefill is what it waits for"
        made.put("q", Role.PREFILL)
        assert room.room_in_ms(ticket) == 0
    decode.load = Load(running=2, waiting=4)
    assert room.room_in_ms(ticket) > 20.0, "both seats are taken and four wait"
    assert room.is_short_of_decode(ticket)


async def test_room_is_where_steps_stay_within_the_slo(made: Fixture) -> None:
    """A step takes 10 ms and 2 more for each sequence: within 40 ms there is room for 13, sequences grow after all."""
    room = FleetRoom(made.fleet, lookahead_ms=20.0)
    made.put("p", Role.PREFILL)
    decode, slot = made.put("d", Role.DECODE, max_num_seqs=64), made.fleet.columns.slot("d")
    for batch in [1, 30, 7, 19] * 20:
        made.fleet.times.saw_steps(slot, batch, 0, 0, 10.0 + 2.0 * batch)

    def room_in_ms(running: int, itl_slo_ms: float | None, output_tokens: int = 100) -> float:
        decode.load = Load(running=running)
        return room.room_in_ms(Ticket("r", 0.0, 100.0, output_tokens=output_tokens, itl_slo_ms=itl_slo_ms))

    assert [room_in_ms(running, 40.0) > 0 for running in (0, 12, 14, 40)] == [False, False, True, True]
    assert room_in_ms(14, 40.0) < room_in_ms(20, 40.0) < room_in_ms(40, 40.0)
    assert room_in_ms(20, 40.0, output_tokens=1000) > 5 * room_in_ms(20, 40.0), "the longer answers are, the later"
    assert room_in_ms(40, None) == 0, "nothing was promised"
    assert room_in_ms(40, 11.0) == 0, "not even one alone would keep it: holding the others helps nobody"
    made.put("e", Role.DECODE, max_num_seqs=64)
    assert room_in_ms(40, 40.0) == 0, "another has room"
    made.fleet.drop("e")
    with made.fleet.ledger.charge("p", (0, 0)), made.fleet.ledger.charge("p", (0, 0)):
        assert room_in_ms(12, 40.0) > 0, "two are on their way from prefill"


async def test_the_least_work_is_where_most_is_cached(made: Fixture) -> None:
    assert least_work(made.view(), 500) == (500, 0.0)
    made.put("d", Role.DECODE)
    assert least_work(made.view(500), 500)[0] == 500
    made.put("p", Role.PREFILL)
    uncached, ms = least_work(made.view(500), 500)
    assert (uncached, ms) == (500, pytest.approx(float(np.dot(Priors().prompt, (1.0, 500.0, 125.0)))))


async def test_views_are_of_those_that_serve_it(made: Fixture) -> None:
    made.put("p", Role.PREFILL, adapters=frozenset("x"), adapter_load_ms=7.0)
    made.put("d", Role.DECODE, adapters=frozenset("xy"), adapter_load_ms=9.0).load = Load(adapters=frozenset("x"))
    made.put("e", Role.DECODE)
    fleet, found = made.fleet, made.fleet.forecast(lambda size: b"")

    def columns(adapter: str) -> dict[str, tuple[bool, bool, bool, float]]:
        view = fleet.view(found, 100, 10, adapter)
        told = zip(view.prefills, view.decodes, view.has_adapter, view.adapter_ms, strict=True)
        return dict(zip(view.ids, told, strict=True))

    assert columns("x") == {"p": (True, False, False, 7), "d": (False, True, True, 0), "e": (False, False, False, 0)}
    assert columns("y") == {"p": (False, False, False, 7), "d": (False, True, False, 9), "e": (False, False, False, 0)}
    assert columns("") == {"p": (True, False, True, 0), "d": (False, True, True, 0), "e": (False, True, True, 0)}
    made.put("e", Role.DECODE, epoch=2, adapters=frozenset("y"))
    assert made.fleet.view(fleet.forecast(lambda size: b""), 100, 10, "y").decodes.sum() == 2
    assert least_work(fleet.view(fleet.forecast(lambda size: b""), 100, 10, "z"), 100) == (100, 0.0)
    with pytest.raises(Unavailable, match="serves the adapter 'z'") as refused:
        eligible(SchedulingRequest(100, adapter="z"), fleet.view(fleet.forecast(lambda size: b""), 100, 10, "z"))
    assert refused.value.reason == "no_adapter"


async def test_room_is_that_of_those_that_serve_it(made: Fixture) -> None:
    room = FleetRoom(made.fleet, lookahead_ms=20.0)
    made.put("d", adapters=frozenset("x"))
    made.put("e")
    of = {name: Ticket("r", 0.0, 100.0, prompt_tokens=1000, output_tokens=10, adapter=name) for name in ("x", "")}
    assert [room.room_in_ms(ticket) for ticket in of.values()] == [0, 0]
    assert room.room_in_ms(Ticket("r", 0.0, 100.0, adapter="y")) == room.drain_ms("y") == np.inf
    with made.fleet.ledger.charge("d", (900_000, 0)):
        assert room.room_in_ms(of["x"]) > 0 < room.drain_ms("x")
        assert room.room_in_ms(of[""]) == room.drain_ms() == 0
    made.fleet.get("d").load = Load(running=2, waiting=5)  # type: ignore[union-attr]
    assert room.is_short_of_decode(of["x"]) and not room.is_short_of_decode(of[""])


async def test_what_was_sent_brings_its_adapter_along_until_two_reports_know_nothing_of_it(made: Fixture) -> None:
    member = made.put("d", Role.DECODE, adapters=frozenset("x"), adapter_load_ms=9.0)
    fleet = made.fleet

    def wait_ms() -> float:
        view = fleet.view(fleet.forecast(lambda size: b""), 100, 10, "x")
        return float(view.adapter_ms[0])

    assert wait_ms() == 9.0
    with fleet.attempt("d", "x"):
        assert wait_ms() == 0.0
        member.load = Load()
        assert wait_ms() == 0.0, "the report may have left the worker before the leg came"
        member.load = Load()
        assert wait_ms() == 9.0
    member.load = Load(adapters=frozenset("x"))
    assert wait_ms() == 0.0
