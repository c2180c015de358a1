"""The queue: strict bands, fair tenants, orders, bounds; every ticket ends once."""

import random
import tracemalloc
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_common.errors import ResourceExhausted
from omni_proxy.flow.band import AGING_EVERY as BAND_AGING
from omni_proxy.flow.fairness import FAIRNESS
from omni_proxy.flow.lane import AGING_EVERY as LANE_AGING
from omni_proxy.flow.orders import ORDERS
from omni_proxy.flow.queue import FlowQueue
from omni_proxy.flow.settings import BandSettings, FlowSettings
from omni_proxy.flow.ticket import Ticket

FAR = 1e9


def ticket(
    name: str = "r", tenant: str = "", *, arrived: float = 0.0, deadline: float = FAR, **fields: object
) -> Ticket:
    return Ticket(name, arrived, deadline, tenant, **fields)  # type: ignore[arg-type]


def queue_of(**fields: object) -> FlowQueue:
    return FlowQueue(FlowSettings.model_validate(fields))


def bands(*rows: tuple[int, float], **fields: object) -> tuple[BandSettings, ...]:
    return tuple(BandSettings(priority=p, name=f"b{p}", hold_back=h, **fields) for p, h in rows)  # type: ignore[arg-type]


def popped(queue: FlowQueue, now: float = 0.0) -> list[str]:
    return [t.request_id for t in iter(lambda: queue.pop(now), None)]


def test_a_higher_band_goes_first_whatever_it_has_attained():
    queue = queue_of()
    for number in range(40):
        queue.offer(ticket(f"low{number}", "a", priority=-10), 0)
        queue.offer(ticket(f"mid{number}", "b", priority=5), 0)
        queue.offer(ticket(f"top{number}", "c", priority=10, output_tokens=9999), 0)
    ranks = [{"top": 0, "mid": 1, "low": 2}[name[:3]] for name in popped(queue)]
    assert ranks == sorted(ranks) and len(ranks) == 120


@pytest.mark.parametrize(
    ("priority", "band"),
    [(99, "high"), (10, "high"), (9, "default"), (0, "default"), (-1, "sheddable"), (-99, "sheddable")],
)
def test_a_priority_falls_into_the_highest_band_not_above_it(priority, band):
    assert queue_of().band_of(ticket(priority=priority)).settings.name == band


def test_a_band_that_holds_back_leaves_room_to_higher_ones():
    queue = queue_of(bands=bands((5, 0.0), (0, 0.5)))
    queue.offer(ticket("low"), 0)
    assert queue.pop(0, saturation=0.5) is None
    queue.offer(ticket("high", priority=5), 0)
    assert queue.pop(0, saturation=0.99).request_id == "high"
    assert queue.pop(0, saturation=0.49).request_id == "low"


@pytest.mark.parametrize("fairness", ["least_attained_service", "round_robin"])
@pytest.mark.parametrize("weights", [{"a": 1, "b": 2, "c": 4}, {"a": 1, "b": 1, "c": 1}, {"a": 0.5, "b": 3, "c": 0.5}])
def test_service_follows_the_weights(fairness, weights):
    """1,000 releases over tenants that always have requests waiting; requests of one tenant are ten times as long."""
    queue = queue_of(fairness=fairness, order="fcfs", max_tenant_requests=5000)
    sizes = {"a": 1000, "b": 100, "c": 100}
    for number in range(1000):
        for name, weight in weights.items():
            queue.offer(ticket(f"{number}", name, weight=weight, uncached_tokens=sizes[name]), 0)
    served: Counter[str] = Counter()
    for number in range(1000):
        if (chosen := queue.pop(number * 0.005)) is not None:
            served[chosen.tenant] += chosen.service if FAIRNESS[fairness].forgets else 1
    total, whole = sum(served.values()), sum(weights.values())
    for name, weight in weights.items():
        assert served[name] / total == pytest.approx(weight / whole, rel=0.1)


def test_the_tenant_that_had_least_goes_first_and_older_service_counts_less():
    queue = queue_of(half_life_s=10)
    queue.pass_by(ticket("r", "early", uncached_tokens=1000), 0)
    queue.pass_by(ticket("r", "late", uncached_tokens=600), 30)
    for tenant in ("early", "late", "new"):
        queue.offer(ticket(tenant, tenant, uncached_tokens=1), 30)
    assert popped(queue, 30) == ["new", "early", "late"]


def test_who_was_away_takes_turns_with_the_others_under_round_robin():
    queue = queue_of(fairness="round_robin")
    for number in range(30):
        queue.offer(ticket(f"a{number}", "a"), 0)
    for _ in range(20):
        queue.pop(0)
    for number in range(10):
        queue.offer(ticket(f"b{number}", "b"), 0)
    assert "".join(name[0] for name in popped(queue)[:8]) in ("abababab", "babababa")


def test_aged_tenants_take_turns_while_newcomers_go_first():
    """Both had much service before: each goes at least once in half a TTL."""
    queue = queue_of(ttl_s=0.2, max_requests=10**6)
    for tenant in ("old1", "old2"):
        queue.pass_by(ticket("r", tenant, uncached_tokens=10**9), 0)
        for number in range(40):
            queue.offer(ticket(f"{number}", tenant), 0)
    served: Counter[str] = Counter()
    for number in range(100 + 20 * BAND_AGING):
        now = 0.001 * number
        queue.offer(ticket("n", f"new{number}", arrived=now), now)
        served[queue.pop(now).tenant[:4]] += 1
    assert served["old1"] == served["old2"] >= 5


def test_settling_corrects_what_was_charged():
    queue = queue_of()
    short, long = ticket("s", "short", output_tokens=100), ticket("l", "long", output_tokens=100)
    for each in (short, long):
        queue.offer(each, 0)
        queue.pop(0)
    queue.settle(short, -150, 1)
    for tenant in ("long", "short"):
        queue.offer(ticket(tenant, tenant), 1)
    assert popped(queue, 1) == ["short", "long"]


def test_levels_survive_years_without_loss_of_order():
    queue = queue_of(half_life_s=1)
    for second in range(0, 3000, 10):
        queue.pass_by(ticket("r", "busy", uncached_tokens=100), second)
        queue.pass_by(ticket("r", "calm", uncached_tokens=10), second)
    queue.offer(ticket("busy", "busy"), 3000)
    queue.offer(ticket("calm", "calm"), 3000)
    assert popped(queue, 3000) == ["calm", "busy"]


@pytest.mark.parametrize("passes_by", [False, True])
def test_tenants_stay_equal_for_years(passes_by: bool) -> None:
    """Sums of what was attained are made smaller now and then; nobody may be left out of that."""
    queue = queue_of(half_life_s=1, ttl_s=FAR)
    names = ("a", "b", "c")
    served: Counter[str] = Counter()
    for name in names * 2:
        queue.offer(ticket(name, name, uncached_tokens=100), 0)
    for step in range(6000):
        now = step * 0.2
        if passes_by:
            queue.pass_by(ticket("p", names[step % 3], uncached_tokens=100), now)
        taken = queue.pop(now)
        assert taken is not None
        served[taken.tenant] += 1
        queue.offer(ticket(taken.tenant, taken.tenant, uncached_tokens=100), now)
        if step % 300 == 299:
            assert max(served.values()) - min(served.values()) <= 6, f"at {now:.0f} s"
            served.clear()


def test_what_is_given_back_late_weighs_as_it_was_charged() -> None:
    queue = queue_of(half_life_s=1)
    queue.pass_by(early := ticket("e", "early", output_tokens=100), 0)
    queue.pass_by(ticket("o", "other", output_tokens=100), 10)
    queue.pass_by(ticket("e2", "early", output_tokens=101), 10)
    queue.settle(early, -early.service, 0)
    for tenant in ("early", "other"):
        queue.offer(ticket(tenant, tenant), 10)
    assert popped(queue, 10) == ["other", "early"]


def test_without_fairness_the_order_is_of_all_tenants():
    queue = queue_of(fairness="none", order="spt")
    for name, tokens in (("a", 30), ("b", 10), ("c", 20)):
        queue.offer(ticket(name, name, uncached_tokens=tokens), 0)
    assert popped(queue) == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("fcfs", "abcd"),
        ("deadline", "bdca"),
        ("slo", "dcab"),
        ("lpt", "bdca"),
        ("spt", "acdb"),
        ("length_bucket", "acdb"),
        ("earliest_batch", "acdb"),
    ],
)
def test_orders(order, expected):
    queue = queue_of(order=order)
    queue.offer(ticket("a", arrived=0.00, uncached_tokens=10, prefill_ms=10), 0)
    queue.offer(ticket("b", arrived=0.01, uncached_tokens=900, prefill_ms=900, ttft_slo_ms=100), 0)
    queue.offer(ticket("c", arrived=0.02, uncached_tokens=11, prefill_ms=11, ttft_slo_ms=900), 0)
    queue.offer(ticket("d", arrived=0.03, uncached_tokens=90, prefill_ms=90, ttft_slo_ms=500), 0)
    assert "".join(popped(queue)) == expected


def test_earlier_batches_go_before_later_ones():
    for order in ("length_bucket", "earliest_batch"):
        queue = queue_of(order=order)
        queue.offer(ticket("long", arrived=1.0, uncached_tokens=900), 2)
        queue.offer(ticket("short", arrived=2.0, uncached_tokens=1), 2)
        assert popped(queue, 2) == ["long", "short"]


def test_what_can_no_longer_be_in_time_yields_until_it_has_aged():
    queue = queue_of(order="slo", ttl_s=200)
    queue.offer(ticket("lost", ttft_slo_ms=50, prefill_ms=100), 0)
    at = None
    for number in range(200):
        queue.offer(ticket(f"{number}", arrived=number, ttft_slo_ms=500), number)
        if queue.pop(number).request_id == "lost":
            at = number
            break
    assert at is not None and 100 <= at < 100 + LANE_AGING


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fairness", FAIRNESS)
def test_nobody_starves_however_many_newcomers_there_are(order, fairness):
    """From half the TTL on, a bound in releases: the lane's place among the aged, times its own in the lane."""
    queue = queue_of(order=order, fairness=fairness, ttl_s=0.4, max_requests=10**6, max_tenant_requests=10**6)
    older, rng = 3, random.Random(5)
    queue.pass_by(ticket("big", "victim", uncached_tokens=10**9), 0)
    for number in range(older):
        queue.offer(ticket(f"old{number}", "victim", uncached_tokens=10**6, ttft_slo_ms=1, prefill_ms=9), 0)
    bound = 200 + BAND_AGING * LANE_AGING * (older + 1)
    waiting = older
    for number in range(bound):
        now = 0.001 * number
        tenant = rng.choice(["victim", f"new{number}", "other"])
        queue.offer(ticket("n", tenant, arrived=now, uncached_tokens=1, ttft_slo_ms=1e6), now)
        waiting -= queue.pop(now).request_id.startswith("old")
        if not waiting:
            return
    pytest.fail(f"{waiting} still wait after {bound} releases")


@pytest.mark.parametrize(
    ("limits", "fits", "reason"),
    [
        ({"max_requests": 2}, 2, "queue_full"),
        ({"max_bytes": 25}, 2, "queue_full"),
        ({"max_tenant_requests": 3}, 3, "tenant_queue_full"),
        ({"max_tenant_bytes": 39}, 3, "tenant_queue_full"),
        ({"bands": bands((0, 0.0), max_requests=1)}, 1, "band_full"),
        ({"bands": bands((0, 0.0), max_bytes=10)}, 1, "band_full"),
        ({"bands": bands((0, 0.5)), "max_requests": 4}, 2, "held_back"),
    ],
)
def test_bounds(limits, fits, reason):
    queue = queue_of(**limits)
    for _ in range(fits):
        queue.offer(ticket(size_bytes=10), 0)
    with pytest.raises(ResourceExhausted) as refused:
        queue.offer(ticket(size_bytes=10), 0)
    assert refused.value.reason == reason and len(queue) == fits


def test_a_full_queue_displaces_the_newest_of_the_lowest_sheddable_band():
    queue = queue_of(max_requests=4, bands=bands((0, 0.0), (-1, 0.0), (-2, 0.0)))
    tickets = {n: ticket(n, priority=p) for n, p in (("a", -2), ("b", -2), ("c", -1), ("d", 0))}
    for each in tickets.values():
        queue.offer(each, 0)
    assert queue.offer(ticket("e"), 0) == [tickets["b"]]
    assert queue.offer(ticket("f", priority=-1), 0) == [tickets["a"]]
    with pytest.raises(ResourceExhausted):
        queue.offer(ticket("g", priority=-1), 0)
    assert popped(queue) == ["d", "e", "c", "f"]


def test_waiting_ends_with_the_ttl_or_the_requests_own_deadline():
    queue = queue_of(ttl_s=10)
    queue.offer(ticket("ttl"), 0)
    queue.offer(ticket("own", deadline=4.0), 0)
    assert queue.next_expiry_s == 4.0
    assert [t.request_id for t in queue.expire(4.0)] == ["own"]
    assert not queue.expire(9.9) and [t.request_id for t in queue.expire(10.0)] == ["ttl"]
    assert len(queue) == 0 and queue.next_expiry_s is None and queue.size_bytes == 0


def test_reconfiguring_moves_everyone_and_keeps_what_tenants_had():
    queue = queue_of(order="fcfs")
    queue.pass_by(ticket("r", "rich", uncached_tokens=10**6), 0)
    for number in range(20):
        queue.offer(ticket(f"{number}", ("rich", "poor")[number % 2], priority=number % 3, uncached_tokens=number), 0)
    queue.reconfigure(FlowSettings(max_requests=5, order="lpt", bands=bands((1, 0.0), (0, 0.0))), 1)
    assert len(queue) == 20
    names = popped(queue, 1)
    assert sorted(names, key=int) == [str(n) for n in range(20)]
    assert all(int(n) % 3 for n in names[:13]) and not any(int(n) % 3 for n in names[13:])
    low = [int(n) for n in names[13:]]
    assert low == [15, 9, 3, 18, 12, 6, 0]
    queue.offer(ticket("again"), 1)


def test_tokens_attained_are_not_turns_had():
    queue = queue_of()
    queue.pass_by(ticket("r", "rich", uncached_tokens=5000), 0)
    queue.reconfigure(FlowSettings(fairness="round_robin"), 1)
    for number in range(40):
        queue.offer(ticket(f"{number}", ("rich", "poor")[number % 2]), 1)
    assert Counter(int(name) % 2 for name in popped(queue, 1)[:20]) == {0: 10, 1: 10}


def test_who_comes_after_a_reconfiguration_joins_the_others_where_they_are():
    queue = queue_of(fairness="round_robin")
    for number in range(200):
        queue.offer(ticket(f"{number}", "ab"[number % 2]), 0)
    popped(queue)
    queue.reconfigure(FlowSettings(fairness="round_robin", max_requests=77), 1)
    for number in range(60):
        queue.offer(ticket("cab"[number % 3], "cab"[number % 3]), 1)
    assert Counter(popped(queue, 1)[:30]) == {"a": 10, "b": 10, "c": 10}


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["offer", "offer", "offer", "pop", "pass", "remove", "expire", "reconfigure"]),
        st.integers(0, 5),
        st.integers(-12, 12),
        st.sampled_from(sorted(ORDERS)),
    ),
    max_size=120,
)


def run(script: list[tuple[str, int, int, str]]) -> list[tuple[str, str]]:
    """What became of each ticket, in order of its end."""
    queue = queue_of(max_requests=12, max_bytes=900, max_tenant_requests=8, ttl_s=30)
    ends: list[tuple[str, str]] = []
    alive: dict[str, Ticket] = {}

    def end(how: str, *tickets: Ticket) -> None:
        for each in tickets:
            del alive[each.request_id]
            ends.append((how, each.request_id))

    for step, (action, small, priority, order) in enumerate(script):
        now = float(step)
        if action == "offer":
            slo = 4000.0 * small if small % 2 else None
            offered = ticket(
                f"{step}", f"t{small}", arrived=now, priority=priority, size_bytes=40 * small, ttft_slo_ms=slo,
                uncached_tokens=100 * small, prefill_ms=1000.0 * small, deadline=now + 50,
                adapter="xyz"[priority % 3],
            )  # fmt: skip
            try:
                displaced = queue.offer(offered, now)
            except ResourceExhausted:
                continue
            alive[offered.request_id] = offered
            end("displaced", *displaced)
            assert len(queue) <= 12 and queue.size_bytes <= 900
        elif action == "pop":
            head = queue.head(now)
            taken = queue.pop(now)
            assert taken is head
            if taken is not None:
                top = max(queue.band_of(t).settings.priority for t in alive.values())
                assert queue.band_of(taken).settings.priority == top
                end("popped", taken)
        elif action == "pass":
            passed = frozenset("xyz"[: small % 4])
            beside = [t for t in alive.values() if t.adapter not in passed]
            head, next_one = queue.head(now), queue.head(now, passed)
            assert next_one is queue.head(now, passed) and (next_one is None) is (not beside)
            if next_one is not None:
                assert next_one in beside and (next_one is head or head.adapter in passed)
                assert queue.band_of(next_one) is queue.band_of(max(beside, key=lambda t: t.priority))
                queue.take(next_one, now)
                end("popped", next_one)
        elif action == "remove" and alive:
            victim = alive[sorted(alive)[small % len(alive)]]
            assert queue.remove(victim) and not queue.remove(victim)
            end("removed", victim)
        elif action == "expire":
            end("expired", *queue.expire(now))
            assert all(now < t.arrived_s + 30 for t in alive.values())
        elif action == "reconfigure":
            fairness = sorted(FAIRNESS)[small % 3]
            queue.reconfigure(FlowSettings(
                max_requests=12, max_bytes=900, max_tenant_requests=8, ttl_s=30, order=order, fairness=fairness,
                bands=bands((small, 0.0), (-1 - small, 0.1)),
            ), now)  # fmt: skip
        assert len(queue) == len(alive)
        assert queue.size_bytes == sum(t.size_bytes for t in alive.values())
        assert sum(band.requests for band in queue.bands) == len(alive)
    while (left := queue.pop(len(script))) is not None:
        end("popped", left)
    assert not alive
    return ends


@settings(max_examples=150, deadline=None)
@given(OPERATIONS)
def test_every_ticket_ends_once_within_bounds_and_alike_each_time(script):
    first = run(script)
    assert len({name for _, name in first}) == len(first)
    assert run(script) == first


def test_what_is_remembered_of_tenants_and_ended_tickets_is_bounded():
    queue = queue_of(max_requests=10**6, max_tenant_requests=10**6)
    for number in range(5000):
        each = ticket("r", f"t{number}")
        queue.offer(each, 0)
        queue.remove(each)
    assert sum(band.known_tenants for band in queue.bands) <= 1024


def test_ended_tickets_and_void_places_take_no_memory():
    queue = queue_of()
    queue.offer(ticket("stays", "a", ttft_slo_ms=1e9), 0)
    tracemalloc.start()
    for number in range(4000):
        passing = ticket(f"{number}", "a", ttft_slo_ms=1e9)
        queue.offer(passing, 0)
        queue.remove(passing)
        queue.settle(passing, 1.0, 0)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 200_000


def test_the_cost_of_a_step_does_not_grow_with_what_waits():
    """Comparisons, not seconds: 100 times as many waiting may cost a few more per step, not 100 times as many."""

    class Counted(float):
        count = 0

        def __lt__(self, other: float) -> bool:
            Counted.count += 1
            return float(self) < float(other)

    costs = []
    for waiting in (100, 1_000, 10_000):
        queue = queue_of(order="slo", max_requests=10**6, max_tenant_requests=10**6)
        rng = random.Random(7)

        def offer(queue: FlowQueue = queue, rng: random.Random = rng) -> Ticket:
            each = ticket(
                "r", f"t{rng.randrange(20)}", ttft_slo_ms=Counted(rng.uniform(1e6, 1e9)), deadline=Counted(FAR)
            )
            queue.offer(each, 0)
            return each

        tickets = [offer() for _ in range(waiting)]
        Counted.count = 0
        for number in range(0, waiting, 2):
            queue.remove(tickets[number])
            offer()
            queue.pop(0)
            offer()
        costs.append(Counted.count / (waiting / 2))
    assert all(later < 3 * earlier + 20 for earlier, later in pairwise(costs)), costs
