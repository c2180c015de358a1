"""One run: a trace through one fleet under one system. Deterministic for a seed, whatever the machine."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from tracereplay.clock import Clock
from tracereplay.trace import Request

from fleetsim.constants import DECODE, PREFILL, EngineModel
from fleetsim.proxy import Proxy
from fleetsim.record import Served
from fleetsim.slo import FIXED, Promise
from fleetsim.systems import System
from fleetsim.worker import Network, Worker
from omni_proxy.worker import Role


@dataclass(frozen=True, slots=True)
class Scene:
    """What is held equal over systems. Requests arrive up to `spread_s` after the time in the trace, which tells it in
    steps of that size; each comes to one of `proxies` by chance. `slow`: factors of single workers' times."""

    prefills: int = 8
    decodes: int = 8
    spread_s: float = 3.0
    proxies: int = 1
    seed: int = 0
    promise: Promise = FIXED
    network: Network = field(default_factory=Network)
    prefill_model: EngineModel = PREFILL
    decode_model: EngineModel = DECODE
    slow: tuple[tuple[int, float], ...] = ()

    @property
    def title(self) -> str:
        return f"{self.prefills}P{self.decodes}D"


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that came of it."""

    served: Sequence[Served]
    prefills: int
    """So many of the workers, the first ones, are for prefill."""
    arriving_s: float
    busy: Sequence[float]
    """Share of the arriving time that each worker computed."""
    leaked_blocks: int
    charged: int
    """Legs still in a ledger at the end."""
    decision_s: Sequence[float]


def simulate(scene: Scene, system: System, requests: Sequence[Request]) -> Run:
    """Raises ValueError for an empty trace."""
    if not requests:
        raise ValueError("the trace is empty")
    clock, rng = Clock(), random.Random(scene.seed)
    positions = {key: place for request in requests for place, key in enumerate(request.keys)}
    workers = _workers(clock, scene)
    served: list[Served] = []
    proxies = [
        Proxy(clock, number, workers, system, scene.network, positions, served.append)
        for number in range(scene.proxies)
    ]
    for worker in workers:
        worker.connect(proxies)
    start_s = requests[0].at_s
    last_s = 0.0
    for number, request in enumerate(requests):
        at_s = request.at_s - start_s + rng.uniform(0, scene.spread_s)
        last_s = max(last_s, at_s)
        proxy = proxies[rng.randrange(scene.proxies)]
        clock.at(at_s, proxy.arrive, number, request, scene.promise.of(request.input_tokens))
    clock.run()
    return Run(
        served=served,
        prefills=scene.prefills,
        arriving_s=last_s,
        busy=[worker.engine.worked_s / last_s if last_s else 0.0 for worker in workers],
        leaked_blocks=sum(worker.model.num_blocks - worker.engine.pool.num_available for worker in workers),
        charged=sum(proxy.fleet.ledger.total_requests for proxy in proxies),
        decision_s=[took_s for proxy in proxies for took_s in proxy.decision_s],
    )


def _workers(clock: Clock, scene: Scene) -> list[Worker]:
    slow = dict(scene.slow)
    roles = [Role.PREFILL] * scene.prefills + [Role.DECODE] * scene.decodes
    models = {Role.PREFILL: scene.prefill_model, Role.DECODE: scene.decode_model}
    return [
        Worker(clock, number, role, models[role], scene.network, scene.seed, slow.get(number, 1.0))
        for number, role in enumerate(roles)
    ]
