"""One tenant floods: what the others notice, on a fleet whose workers compute one prompt after the other.

The real gate on an event loop whose time jumps to the next timer, so half a minute of load runs in a second.
"""

import asyncio
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry

from omni_common.errors import ResourceExhausted
from omni_proxy.flow.gate import FlowGate
from omni_proxy.flow.metrics import FlowMetrics
from omni_proxy.flow.queue import FlowQueue
from omni_proxy.flow.settings import FlowSettings
from omni_proxy.flow.ticket import Ticket

WORKERS, SECONDS = 8, 30.0
QUIET = {"quiet1": 8.0, "quiet2": 8.0}
"""Requests per second; the fleet can do about a hundred."""
FLOOD = {"flood": 200.0}


class VirtualLoop(asyncio.SelectorEventLoop):
    """Sleeps take no time: the clock jumps to the next timer."""

    _virtual_s = 0.0

    def time(self) -> float:
        return self._virtual_s

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self._virtual_s = max(self._virtual_s, self._scheduled[0].when())
        super()._run_once()


@dataclass
class SimFleet:
    loop: VirtualLoop
    lookahead_ms: float
    ends_s: list[float] = field(default_factory=lambda: [0.0] * WORKERS)

    def drain_ms(self, adapter: str = "") -> float:
        return max(0.0, min(self.ends_s) - self.loop.time()) * 1e3

    def takers(self, adapter: str) -> str:
        return ""

    def room_in_ms(self, ticket: Ticket) -> float:
        return max(0.0, self.drain_ms() - self.lookahead_ms)

    def begin(self, prefill_ms: float) -> float:
        """Send to the least loaded worker; when its prompt is computed."""
        worker = self.ends_s.index(min(self.ends_s))
        self.ends_s[worker] = max(self.ends_s[worker], self.loop.time()) + prefill_ms / 1e3
        return self.ends_s[worker]


@dataclass
class Load:
    """Open loop: arrivals do not wait for answers."""

    loop: VirtualLoop
    fleet: SimFleet
    gate: FlowGate
    ttft_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    refused: Counter[str] = field(default_factory=Counter)

    async def run(self, rates: dict[str, float]) -> None:
        async with asyncio.TaskGroup() as clients:
            for tenant, rate in rates.items():
                clients.create_task(self._arrivals(tenant, rate, clients))

    async def _arrivals(self, tenant: str, rate: float, clients: asyncio.TaskGroup) -> None:
        rng = random.Random(tenant)
        while self.loop.time() < SECONDS:
            await asyncio.sleep(rng.expovariate(rate))
            prefill_ms = min(400.0, max(10.0, rng.lognormvariate(4.2, 0.6)))
            clients.create_task(self._request(tenant, prefill_ms))

    async def _request(self, tenant: str, prefill_ms: float) -> None:
        arrived = self.loop.time()
        tokens = int(10 * prefill_ms)
        ticket = Ticket(
            "r", arrived, arrived + 600, tenant, uncached_tokens=tokens, output_tokens=100, prefill_ms=prefill_ms
        )
        try:
            turn = await self.gate.turn(ticket)
        except ResourceExhausted:
            self.refused[tenant] += 1
            return
        await asyncio.sleep(self.fleet.begin(prefill_ms) - self.loop.time())
        self.ttft_s[tenant].append(self.loop.time() - arrived)
        turn.ended(100)
        self.gate.poke()


def measured(rates: dict[str, float], **settings: object) -> Load:
    flow = FlowSettings.model_validate(settings)
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        fleet = SimFleet(loop, flow.lookahead_ms)
        load = Load(loop, fleet, FlowGate(FlowQueue(flow), fleet, FlowMetrics(CollectorRegistry()), loop))
        runner.run(load.run(rates))
    return load


def p99(load: Load) -> float:
    quiet = sorted(seconds for tenant in QUIET for seconds in load.ttft_s[tenant])
    return quiet[int(0.99 * (len(quiet) - 1))]


@pytest.fixture(scope="module")
def alone_s() -> float:
    return p99(measured(QUIET))


@pytest.mark.parametrize("fairness", ["least_attained_service", "round_robin"])
def test_quiet_tenants_hardly_notice_a_flood(alone_s, fairness):
    load = measured(QUIET | FLOOD, fairness=fairness)
    assert p99(load) <= 1.3 * alone_s
    assert not any(load.refused[tenant] for tenant in QUIET)
    assert len(load.ttft_s["flood"]) > 0.9 * (100 - 16) * SECONDS, "the flood has what the others leave"


def test_without_fairness_the_flood_is_in_front_of_all(alone_s):
    assert p99(measured(QUIET | FLOOD, fairness="none")) > 10 * alone_s
