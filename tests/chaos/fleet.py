"""Chaos on a simulated fleet, in one process and in virtual time: the proxy's own scheduling over many SimEngines.

python tests/chaos/fleet.py --workers 100 --seconds 600 --seed 7 --json fleet.json

What each request must answer is known beforehand: simulated tokens are a function of prompt and adapter alone. Half of
the requests name an adapter; each worker serves two of the three, one of them at a time.
"""

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from opentelemetry.trace import NoOpTracer
from prometheus_client import CollectorRegistry

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import virtual_loop  # noqa: E402
from sim_worker import Pulls, SimWorker  # noqa: E402

from omni_common.errors import OmniError  # noqa: E402
from omni_common.key_cache import KeyCache  # noqa: E402
from omni_common.prefix_index import PrefixIndex  # noqa: E402
from omni_engine.ports import SamplingParams  # noqa: E402
from omni_engine.sim import SimSettings, Timing  # noqa: E402
from omni_engine.sim.tokens import TokenStream  # noqa: E402
from omni_proxy.fleet import Fleet  # noqa: E402
from omni_proxy.flow.gate import FlowGate  # noqa: E402
from omni_proxy.flow.metrics import FlowMetrics  # noqa: E402
from omni_proxy.flow.queue import FlowQueue  # noqa: E402
from omni_proxy.flow.settings import FlowSettings  # noqa: E402
from omni_proxy.hedging import Hedging, HedgingSettings  # noqa: E402
from omni_proxy.lifecycle import SequenceRun  # noqa: E402
from omni_proxy.metrics import Metrics  # noqa: E402
from omni_proxy.prompt_keys import PromptKeys  # noqa: E402
from omni_proxy.replica import Replica  # noqa: E402
from omni_proxy.room import FleetRoom  # noqa: E402
from omni_proxy.sampling import Sampling  # noqa: E402
from omni_proxy.scheduling.cost import CostPolicy  # noqa: E402
from omni_proxy.scheduling.forecast import LoadCost  # noqa: E402
from omni_proxy.sequence import Limits, OutputLengths, Scheduler, SequenceJob  # noqa: E402
from omni_proxy.tracing import RequestTrace  # noqa: E402
from omni_proxy.worker import Role  # noqa: E402

MODEL = "sim"
ADAPTERS = ("poet", "sql", "summary")
REQUEST_TIMEOUT_S = 120.0
QUIET_S = 60
LASTS_S = (0.5, 12.0)
LOAD_COSTS = {tier: LoadCost(0.0, 1.0) for tier in ("host", "disk", "remote")}
FAULTS = {"die": 20, "stop": 25, "slow": 20, "pulls": 10, "prefills": 10, "break": 10, "events": 5}
SETTINGS = SimSettings(
    num_blocks=2048,
    max_model_len=4096,
    mean_output_tokens=150,
    lease_s=10,
    adapter_slots=1,
    timing=Timing(prefill_base_ms=20, prefill_token_ms=0.2, step_base_ms=20, step_sequence_ms=0.5, adapter_load_ms=30),
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """`rate` requests and `fault_rate` faults arrive each second; the share `abandoned` of requests is, midway."""

    workers: int = 100
    seconds: float = 60.0
    rate: float = 80.0
    fault_rate: float = 6.0
    seed: int = 7
    abandoned: float = 0.05


@dataclass(slots=True)
class Result:
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    leaks: list[str] = field(default_factory=list)
    retries: int = 0
    resumes: int = 0
    hedged: int = 0


class FleetChaos:
    """One run; everything random comes from the scenario's seed."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._now = asyncio.get_running_loop().time
        registry = CollectorRegistry()
        metrics = Metrics(registry)
        replica = Replica(lambda: PrefixIndex(max_blocks=1 << 20, clock=self._now), 2.0, metrics.prefix)
        self.fleet = Fleet(MODEL, replica, LOAD_COSTS, now=self._now)
        keys = PromptKeys(MODEL, KeyCache(1 << 24), metrics.prefix)
        flow = FlowSettings.model_validate({})
        self._queue = FlowQueue(flow)
        gate = FlowGate(self._queue, FleetRoom(self.fleet, flow.lookahead_ms), FlowMetrics(registry))
        hedging = Hedging(HedgingSettings.model_validate({"enabled": True, "budget_ratio": 0.1}))
        self.scheduler = Scheduler(
            self.fleet, CostPolicy(), metrics, MODEL, Limits(8, 10.0), keys, OutputLengths(), gate, hedging=hedging
        )
        half = scenario.workers // 2
        roles = [Role.PREFILL] * half + [Role.DECODE] * (scenario.workers - half)
        self.workers = [
            SimWorker(f"w{i}", role, MODEL, SETTINGS, self.fleet, [a for a in ADAPTERS if a != ADAPTERS[i % 3]])
            for i, role in enumerate(roles)
        ]
        self.result = Result()

    async def run(self) -> Result:
        with patch("omni_engine.sim.engine.open_pull", Pulls(self.workers).open):
            return await self._run()

    async def _run(self) -> Result:
        for worker in self.workers:
            await worker.start()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._requests())
                group.create_task(self._faults())
            await self._quiet()
        finally:
            for worker in self.workers:
                await worker.close()
        return self.result

    async def _requests(self) -> None:
        rng = random.Random(self._scenario.seed)
        starts = [rng.choices(range(1000), k=rng.randrange(64, 1024)) for _ in range(40)]
        end = self._now() + self._scenario.seconds
        async with asyncio.TaskGroup() as group:
            number = 0
            while self._now() < end:
                prompt = rng.choice(starts) + rng.choices(range(1000), k=rng.randrange(1, 400))
                seed = number if number % 4 == 0 else None
                sampling = Sampling(rng.randrange(1, 200), temperature=float(seed is not None), seed=seed)
                leaves_s = rng.uniform(0.0, 3.0) if rng.random() < self._scenario.abandoned else None
                adapter = rng.choice(ADAPTERS) if rng.random() < 0.5 else ""
                group.create_task(self._request(f"r{number}", prompt, sampling, leaves_s, adapter))
                number += 1
                await asyncio.sleep(rng.expovariate(self._scenario.rate))

    async def _request(
        self, name: str, prompt: Sequence[int], sampling: Sampling, leaves_s: float | None, adapter: str
    ) -> None:
        now = self._now()
        job = SequenceJob(name, prompt, sampling, now + REQUEST_TIMEOUT_S, arrived=now, adapter=adapter)
        run = SequenceRun(self.scheduler, job, RequestTrace(NoOpTracer(), {}))
        tokens: list[int] = []
        finish = None
        try:
            async with asyncio.timeout(leaves_s), aclosing(run.stream()) as batches:
                async for batch in batches:
                    tokens += batch.token_ids
                    finish = batch.finish_reason or finish
        except TimeoutError:
            outcome = "abandoned"
        except OmniError as error:
            outcome = f"error: {error.code} {error.reason}"
        else:
            outcome = "complete" if (tokens, finish) == expected(prompt, sampling, adapter) else "defect: wrong"
        if self._now() - now > REQUEST_TIMEOUT_S + 1:
            outcome = "defect: hang"
        self.result.outcomes[outcome] += 1
        self.result.retries += run.record.retries
        self.result.resumes += run.record.resumes
        self.result.hedged += run.record.is_hedged

    async def _faults(self) -> None:
        rng = random.Random(self._scenario.seed + 1)
        end = self._now() + self._scenario.seconds
        async with asyncio.TaskGroup() as lasting:
            while self._now() < end:
                await asyncio.sleep(rng.expovariate(self._scenario.fault_rate))
                kind = rng.choices(list(FAULTS), list(FAULTS.values()))[0]
                worker, lasts_s = rng.choice(self.workers), rng.uniform(*LASTS_S)
                if worker.engine is not None and worker.clock.flows.is_set():
                    self.result.faults[kind] += 1
                    lasting.create_task(self._inflict(worker, kind, lasts_s))

    async def _inflict(self, worker: SimWorker, kind: str, lasts_s: float) -> None:
        engine = worker.engine
        assert engine is not None
        match kind:
            case "die":
                await worker.die()
                await asyncio.sleep(lasts_s)
                await worker.start()
            case "stop":
                worker.stop()
                await asyncio.sleep(lasts_s)
                worker.go_on()
            case "slow":
                engine.faults.slow_factor = 10.0
                await asyncio.sleep(lasts_s)
                engine.faults.slow_factor = 1.0
            case "pulls":
                engine.faults.fail_pulls = 0.7
                await asyncio.sleep(lasts_s)
                engine.faults.fail_pulls = 0.0
            case "prefills":
                engine.faults.fail_next_prefills = 5
            case "break":
                worker.break_session("session_broken")
            case "events":
                engine.faults.drop_next_event_batches = 3

    async def _quiet(self) -> None:
        """Leases that nobody pulled end by themselves; then nothing may be held anywhere."""
        for _ in range(QUIET_S):
            self.result.leaks = self._held()
            if not self.result.leaks:
                return
            await asyncio.sleep(1)

    def _held(self) -> list[str]:
        found = [f"ledger: {self.fleet.ledger.total_requests} requests"] if self.fleet.ledger.total_requests else []
        found += [f"queue: {len(self._queue)} requests"] if len(self._queue) else []
        for worker in self.workers:
            own = self.fleet.ledger.of(worker.id)
            if own.requests or own.prefills or own.uncached_tokens or own.output_tokens:
                found.append(f"{worker.id}: {own}")
            stats = worker.engine.stats() if worker.engine else None
            if stats and (stats.running or stats.waiting or stats.kv_usage or stats.leases or stats.queued_tokens):
                found.append(f"{worker.id}: {stats}")
        return found


def expected(prompt: Sequence[int], sampling: Sampling, adapter: str = "") -> tuple[list[int], str]:
    """Tokens and finish reason of a simulated answer."""
    drawn = SamplingParams(sampling.max_tokens, temperature=sampling.temperature, seed=sampling.seed)
    stream, tokens = TokenStream(SETTINGS, prompt, drawn, adapter=adapter), list[int]()
    for position in range(sampling.max_tokens):
        tokens.append(stream.token(position))
        if (finish := stream.finish(tokens[-1], position)) is not None:
            return tokens, str(finish)
    return tokens, "length"


async def chaos(scenario: Scenario) -> Result:
    return await FleetChaos(scenario).run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in (("workers", int), ("seconds", float), ("rate", float), ("fault-rate", float), ("seed", int)):
        default = getattr(Scenario(), name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--json", type=Path)
    args = vars(parser.parse_args())
    path = args.pop("json")
    scenario = Scenario(**args)
    result = virtual_loop.run(chaos(scenario))
    report: dict[str, Any] = {"scenario": args} | {name: getattr(result, name) for name in Result.__dataclass_fields__}
    total = result.outcomes.total()
    errors = sum(n for o, n in result.outcomes.items() if o.startswith("error"))
    report |= {"requests": total, "error_rate": round(errors / max(1, total), 5)}
    text = json.dumps(report, indent=2)
    print(text)
    if path:
        path.write_text(text + "\n")
    return int(bool(result.leaks) or any(o.startswith("defect") for o in result.outcomes))


if __name__ == "__main__":
    sys.exit(main())
