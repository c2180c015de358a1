"""One prompt on its way: what is known of it on each worker, what is charged, and what its answer teaches."""

from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from omni_common.key_cache import KeyCache
from omni_common.prefix_index import PrefixIndex
from omni_proxy.fleet import Fleet
from omni_proxy.foresight import Foresight
from omni_proxy.metrics import PrefixMetrics
from omni_proxy.prompt_keys import PromptKeys
from omni_proxy.replica import Replica
from omni_proxy.scheduling.forecast import LoadCost
from omni_proxy.scheduling.times import Priors, prompt_features
from omni_proxy.worker import Load, Member, Role, Worker

BLOCK = 16
PROMPT = list(range(100, 200))


class Port:
    ready = True


class Scene:
    """A fleet whose workers nobody reports on, and prompts for it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._registry = CollectorRegistry()
        self._metrics = PrefixMetrics(self._registry)
        costs = dict.fromkeys(("host", "disk", "remote"), LoadCost(0.0, 0.1))
        replica = Replica(lambda: PrefixIndex(max_blocks=1024), 1.0, self._metrics)
        self.fleet = Fleet("m", replica, costs, now=lambda: self.now_s)
        self._keys = PromptKeys("m", KeyCache(1 << 20), self._metrics)

    def put(self, name: str, epoch: int = 1) -> Worker:
        port: Any = Port()
        worker = Worker(name, "", Role.BOTH, epoch, "m", BLOCK, 1000)
        self.fleet.put(Member(worker, port, port, is_reachable=True))
        return worker

    def prompt(self, tokens: list[int] = PROMPT) -> Foresight:
        return Foresight(tokens, self._keys, self.fleet, self._metrics, lambda: self.now_s)

    def holds(self, worker: Worker, tokens: list[int]) -> None:
        """It has computed them."""
        self.prompt(tokens).pulled(worker)

    def prefill_ms(self, name: str, new: int, cached: int = 0) -> float:
        slots = np.array([self.fleet.columns.slot(name)])
        return float(self.fleet.times.of(slots, self.now_s, new + cached, 1, np.array([new])).prefill_ms[0])

    def forecasts(self, result: str) -> float:
        return self._registry.get_sample_value("omni_proxy_prefix_forecasts_total", {"result": result}) or 0.0


@pytest.fixture
async def scene() -> Scene:
    return Scene()


async def test_a_look_knows_what_each_worker_holds(scene: Scene) -> None:
    warm, cold = scene.put("warm"), scene.put("cold")
    scene.holds(warm, PROMPT[:64])
    prompt = scene.prompt()
    assert prompt.cached_tokens(warm) == 0, "nobody has looked yet"
    view = prompt.view(10)
    assert dict(zip(view.ids, view.cached_tokens.tolist(), strict=True)) == {"warm": 64, "cold": 0}
    assert (prompt.cached_tokens(warm), prompt.cached_tokens(cold)) == (64, 0)
    assert (prompt.uncached_tokens(warm), prompt.uncached_tokens(warm, 7)) == (36, 43)
    assert prompt.attributes(warm)["omni.predicted_cached_tokens"] == 64
    gone = Worker("gone", "", Role.BOTH, 1, "m", BLOCK, 1000)
    assert (prompt.cached_tokens(gone), prompt.attributes(gone)) == (0, {"omni.worker_id": "gone"})


async def test_a_second_look_sees_loads_and_caches_only_where_asked(scene: Scene) -> None:
    worker = scene.put("w")
    prompt = scene.prompt()
    prompt.view(10)
    scene.holds(worker, PROMPT[:64])
    member = scene.fleet.get("w")
    assert member is not None
    member.load = Load(running=5)
    view = prompt.view(10, afresh=False)
    assert (view.cached_tokens.tolist(), view.running.tolist()) == ([0], [5])
    assert prompt.view(10).cached_tokens.tolist() == [64]
    scene.holds(worker, PROMPT)
    scene.put("other")
    view = prompt.view(10, afresh=False)
    assert sorted(zip(view.ids, view.cached_tokens.tolist(), strict=True)) == [("other", 0), ("w", 96)]


async def test_what_is_ahead_leaves_out_the_prompt_itself(scene: Scene) -> None:
    worker = scene.put("w")
    first, second = scene.prompt(), scene.prompt(PROMPT[::-1])
    first.view(10)
    second.view(10)
    alone_ms = scene.prefill_ms("w", 100)
    with first.compute_on(worker, 5) as one, second.compute_on(worker, 5) as other:
        assert scene.fleet.ledger.of("w").uncached_tokens == 200
        seen = one.computed(0, alone_ms)
        assert seen is not None
        assert seen.predicted_ms == pytest.approx(alone_ms)
        assert scene.fleet.ledger.of("w").uncached_tokens == 100
        seen = other.computed(0, 2 * alone_ms)
        assert seen is not None
        assert seen.predicted_ms == pytest.approx(2 * alone_ms, rel=0.01)
        assert scene.fleet.ledger.of("w").requests == 2
    assert scene.fleet.ledger.total_requests == 0


async def test_learning_goes_by_what_the_worker_found(scene: Scene) -> None:
    worker = scene.put("w")
    scene.holds(worker, PROMPT)
    prompt = scene.prompt()
    prompt.view(10)
    with prompt.compute_on(worker, 5) as computing:
        assert scene.fleet.ledger.of("w").uncached_tokens == 4
        seen = computing.computed(32, 50.0)
    assert seen is not None
    assert seen.predicted_ms == pytest.approx(float(np.dot(Priors().prompt, prompt_features(68, 32))))
    assert prompt.compare(worker, 32) == 96
    assert (scene.forecasts("less"), scene.forecasts("exact")) == (1, 0)
    assert prompt.compare(worker, 32, foreseen=32) == 32
    assert scene.forecasts("exact") == 1


async def test_a_leg_that_ends_without_an_answer_teaches_nothing(scene: Scene) -> None:
    worker = scene.put("w")
    prompt = scene.prompt()
    prompt.view(10)
    before = scene.prefill_ms("w", 1000)
    with pytest.raises(RuntimeError), prompt.compute_on(worker, 5, generated=3):
        assert scene.fleet.ledger.of("w").uncached_tokens == 103
        scene.now_s += 100.0
        raise RuntimeError
    assert scene.prefill_ms("w", 1000) == before
    assert scene.fleet.ledger.total_requests == 0
    assert scene.fleet.ledger.of("w").uncached_tokens == 0


async def test_a_mark_is_what_later_prompts_expect(scene: Scene) -> None:
    worker = scene.put("w")
    first, second = scene.prompt(), scene.prompt([*PROMPT[:80], *range(20)])
    with first.mark(worker) as mark:
        view = second.view(10)
        assert (view.cached_tokens.tolist(), view.expected_tokens.tolist()) == ([80], [80])
        mark.withdraw()
    assert second.view(10).cached_tokens.tolist() == [0]
