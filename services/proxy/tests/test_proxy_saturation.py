"""What autoscalers read: how full each role is."""

import asyncio
import re
import threading
import time
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from omni_common.prefix_index import PrefixIndex
from omni_proxy.fleet import Fleet
from omni_proxy.metrics import PrefixMetrics
from omni_proxy.pulse import Pulse
from omni_proxy.replica import Replica
from omni_proxy.saturation import Saturation, Waiting
from omni_proxy.scheduling.request import Slo
from omni_proxy.worker import Load, Member, Role, Worker


class Port:
    ready = True


@pytest.fixture
async def fleet() -> Fleet:
    replica = Replica(lambda: PrefixIndex(max_blocks=16), 1.0, PrefixMetrics(CollectorRegistry()))
    fleet = Fleet("m", replica, {}, now=lambda: 0.0)
    for name, role in (("p", Role.PREFILL), ("d1", Role.DECODE), ("d2", Role.DECODE)):
        worker = Worker(name, "", role, 1, "m", 0, 1000, max_num_seqs=10)
        port: Any = Port()
        fleet.put(Member(worker, port, port, is_reachable=True))
    return fleet


PROMISED, NOTHING = Slo(1000.0, 50.0), Waiting()


def saturation_of(fleet: Fleet, slo: Slo = PROMISED, waiting: Waiting = NOTHING) -> Saturation:
    return Saturation(fleet, lambda: slo, lambda: waiting, Pulse(CollectorRegistry()))


def roles(fleet: Fleet, slo: Slo = PROMISED, waiting: Waiting = NOTHING) -> dict[str, Any]:
    return {role.role: role for role in saturation_of(fleet, slo, waiting).roles()}


async def test_prefill_is_full_when_its_backlog_takes_the_time_of_a_first_token(fleet: Fleet) -> None:
    assert roles(fleet)["prefill"].saturation == 0
    assert roles(fleet, waiting=Waiting(500.0))["prefill"].saturation == pytest.approx(0.5)
    with fleet.ledger.charge("p", (5000, 0)):
        sent = roles(fleet)["prefill"]
        assert sent.backlog_ms == pytest.approx(10 + 500 + 5000 * 2500 / 1e6)
        assert roles(fleet, waiting=Waiting(500.0))["prefill"].backlog_ms == pytest.approx(sent.backlog_ms + 500)
    assert roles(fleet)["prefill"].saturation == 0


@pytest.mark.parametrize(
    ("load", "saturation"),
    [
        (Load(running=5, waiting=1), 0.6),
        (Load(running=1, kv_usage=0.9), 0.9),
        (Load(running=1, waiting=29), 3.0),
    ],
)
async def test_decode_is_as_full_as_its_scarcest_part(fleet: Fleet, load: Load, saturation: float) -> None:
    for name in ("d1", "d2"):
        member = fleet.get(name)
        assert member is not None
        member.load = load
    assert roles(fleet, Slo(1000.0, 1e6))["decode"].saturation == pytest.approx(saturation)


async def test_long_steps_fill_decode_too(fleet: Fleet) -> None:
    decode = roles(fleet, Slo(itl_ms=1.0))["decode"]
    assert decode.step_ms > 1
    assert decode.saturation == pytest.approx(decode.step_ms)


async def test_what_waits_for_decode_fills_decode(fleet: Fleet) -> None:
    """Not prefill: an autoscaler would add engines of the wrong role."""
    held = roles(fleet, waiting=Waiting(500.0, is_for_decode=True))
    assert (held["prefill"].saturation, held["prefill"].backlog_ms) == (0, 0)
    assert held["decode"].saturation == 1


async def test_nobody_there_is_no_saturation() -> None:
    replica = Replica(lambda: PrefixIndex(max_blocks=16), 1.0, PrefixMetrics(CollectorRegistry()))
    empty = roles(Fleet("m", replica, {}, now=lambda: 0.0))
    assert [(empty[role].workers, empty[role].saturation) for role in ("prefill", "decode")] == [(0, 0.0), (0, 0.0)]


async def test_each_worker_is_as_full_as_its_fuller_role(fleet: Fleet) -> None:
    first = fleet.get("d1")
    assert first is not None
    first.load = Load(running=5)
    with fleet.ledger.charge("p", (5000, 0)):
        full = saturation_of(fleet, Slo(1000.0), Waiting(9.0)).workers()
    assert full == {"p": pytest.approx(0.5225), "d1": 0.5, "d2": 0.0}


async def test_who_scrapes_from_a_thread_reads_what_the_page_says(start: Any) -> None:
    """METRICS_PORT is served by one. What the figures come from is read by the loop alone."""
    stack = await start("p d")
    threads = set()
    fleet = stack.proxy.fleet
    tell = fleet.times.confidence

    def confidence() -> Any:
        threads.add(threading.get_ident())
        return tell()

    fleet.times.confidence = confidence  # type: ignore[method-assign]
    await stack.chat(stream=False)
    scraped = (await asyncio.to_thread(generate_latest, stack.registry)).decode()
    for line in (
        'omni_proxy_workers{role="decode"} 1.0',
        'omni_proxy_worker_health{state="closed"} 2.0',
        'omni_proxy_prediction_confidence{model="prefill"}',
        'omni_proxy_saturation{role="prefill"}',
        'omni_proxy_flow_waiting{band="default"} 0.0',
    ):
        assert line in scraped
    assert float(re.search(r"^omni_proxy_prefix_blocks (\S+)", scraped, re.MULTILINE)[1]) > 0  # type: ignore[index]
    assert threads == {threading.get_ident()}
    fleet.drop("d")
    again = (await asyncio.to_thread(generate_latest, stack.registry)).decode()
    assert 'omni_proxy_workers{role="decode"} 0.0' in again


async def test_a_figure_that_cannot_be_read_takes_no_other_with_it(start: Any) -> None:
    stack = await start("p d")

    def confidence() -> Any:
        raise ValueError("a predictor of somebody else")

    stack.proxy.fleet.times.confidence = confidence
    page = await stack.client.get("/metrics")
    assert page.status_code == 200
    assert 'omni_proxy_workers{role="decode"} 1.0' in page.text
    assert 'omni_proxy_saturation{role="decode"}' in page.text


async def test_the_page_and_the_metric(start: Any) -> None:
    stack = await start("p d")
    page = (await stack.client.get("/saturation")).json()["roles"]
    assert [(role["role"], role["workers"]) for role in page] == [("prefill", 1), ("decode", 1), ("proxy", 1)]
    assert stack.registry.get_sample_value("omni_proxy_saturation", {"role": "decode"}) is not None
    requests = [asyncio.create_task(stack.chat(stream=False)) for _ in range(4)]
    assert {r.status_code for r in await asyncio.gather(*requests)} == {200}


async def test_a_request_that_waits_for_a_seat_says_that_decode_is_full(start: Any) -> None:
    stack = await start("p d")
    decode = stack.proxy.fleet.get("d")
    decode.load = Load(running=64, waiting=9)
    answer = asyncio.create_task(stack.chat(stream=False))
    async with asyncio.timeout(10):
        while not stack.metric("omni_proxy_flow_waiting", band="default"):  # noqa: ASYNC110
            await asyncio.sleep(0)
    page = {role["role"]: role for role in (await stack.client.get("/saturation")).json()["roles"]}
    assert (page["prefill"]["saturation"], page["prefill"]["backlog_ms"]) == (0, 0)
    assert page["decode"]["saturation"] > 1
    decode.load = Load()
    assert (await answer).status_code == 200


async def test_a_proxy_whose_event_loop_is_held_up_says_so(start: Any) -> None:
    """What waits for the loop waits in no queue: its own figures alone show it."""
    stack = await start("p d")

    def late(bound: str) -> float:
        return stack.registry.get_sample_value("omni_proxy_event_loop_lag_seconds_bucket", {"le": bound}) or 0.0

    held_until = time.monotonic() + 0.5
    while time.monotonic() < held_until:
        pass
    page = {role["role"]: role for role in (await stack.client.get("/saturation")).json()["roles"]}
    assert late("+Inf") - late("0.25") >= 1
    busy = stack.registry.get_sample_value("omni_proxy_event_loop_busy_seconds_total")
    assert busy is not None
    assert busy > 0.1
    assert 0.01 < page["proxy"]["saturation"] <= 1.05
    assert page["proxy"]["backlog_ms"] > 10


def test_the_share_of_a_core_follows_the_latest_seconds() -> None:
    pulse = Pulse(CollectorRegistry())
    for _ in range(300):
        pulse.beat(0.1, 0.09)
    assert (pulse.busy, pulse.lag_ms) == (pytest.approx(0.9, rel=0.01), 0.0)
    pulse.beat(20.0, 0.0)
    assert pulse.busy < 0.02
