"""A worker's service around its engine: what it reports to proxies, and how late."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tracereplay.clock import Clock
from tracereplay.reports import Reports

from fleetsim.constants import EngineModel
from fleetsim.engine import Engine
from fleetsim.leg import Leg, Stats
from omni_engine.ports import BlockEvent
from omni_proxy.worker import Load, Role


@dataclass(frozen=True, slots=True)
class Network:
    """Seconds. Stats are of the moment in which they arrive. Each worker publishes block events each `publish_s` at a
    phase of its own; they arrive `events_s` later, half to one and a half of it."""

    message_s: float = 0.001
    stats_s: float = 0.05
    publish_s: float = 0.2
    events_s: float = 0.02


class Listener(Protocol):
    """A proxy, as workers know it."""

    def loaded(self, worker: int, load: Load) -> None: ...

    def reported(self, worker: int, events: Sequence[BlockEvent]) -> None: ...


@dataclass(slots=True)
class _Account:
    """Of one proxy on this worker."""

    prefills: int = 0
    uncached_tokens: int = 0
    sequences: int = 0


_NOBODY = _Account()


class Worker:
    """Legs are taken for proxies, which are told by number."""

    def __init__(
        self, clock: Clock, number: int, role: Role, model: EngineModel, network: Network, seed: int, slow: float
    ) -> None:
        self.number, self.role, self.model = number, role, model
        self.name = f"{'p' if role is Role.PREFILL else 'd'}{number:02}"
        self._clock, self._network = clock, network
        self._rng = random.Random(f"{seed}/{number}")
        self._reports = Reports(clock, network.publish_s, network.events_s, self._rng, self._reported)
        self.engine = Engine(clock, model, random.Random(f"{seed}/{number}/steps"), self._reports.add, slow)
        self._accounts: dict[int, _Account] = defaultdict(_Account)
        self._listeners: Sequence[Listener] = ()
        self._stats_phase_s = self._rng.uniform(0, network.stats_s)
        self._ticking = False
        self._told_idle = True
        self._told = -1
        self._busy = 0

    def connect(self, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners

    def take(self, leg: Leg, proxy: int, uncached_tokens: int) -> None:
        """`uncached_tokens`: what the proxy believes is to be computed here, 0 for a pull."""
        account = self._accounts[proxy]
        account.sequences += 1
        self._busy += 1
        if not leg.pulls:
            account.prefills += 1
            account.uncached_tokens += uncached_tokens
            leg.on_first = self._computed_for(proxy, uncached_tokens, leg.on_first)
        leg.on_end = self._ended_for(proxy, leg.on_end)
        self.engine.take(leg)
        if not self._ticking:
            self._ticking = True
            self._clock.at(self._clock.next_tick(self._stats_phase_s, self._network.stats_s), self._tick)

    def _computed_for(
        self, proxy: int, uncached_tokens: int, then: Callable[[Leg], None] | None
    ) -> Callable[[Leg], None]:
        def computed(leg: Leg) -> None:
            account = self._accounts[proxy]
            account.prefills -= 1
            account.uncached_tokens -= uncached_tokens
            if then is not None:
                self._clock.after(self._network.message_s, then, leg)

        return computed

    def _ended_for(self, proxy: int, then: Callable[[Leg], None] | None) -> Callable[[Leg], None]:
        def ended(leg: Leg) -> None:
            self._accounts[proxy].sequences -= 1
            self._busy -= 1
            if then is not None:
                self._clock.after(self._network.message_s, then, leg)

        return ended

    def _tick(self) -> None:
        """Stats arrive, as of now, unless they would repeat the last ones. After the last work they end."""
        if self.engine.decodes or self._told != self.engine.changes or len(self._listeners) > 1:
            self._told = self.engine.changes
            for listener, load in zip(self._listeners, self._loads(), strict=True):
                listener.loaded(self.number, load)
        if self._busy:
            self._told_idle = False
        elif self._told_idle:
            self._ticking = False
            return
        else:
            self._told_idle = True
        self._clock.after(self._network.stats_s, self._tick)

    def _loads(self) -> list[Load]:
        stats, listeners = self.engine.stats(), self._listeners
        if len(listeners) == 1:
            return [self._load(stats, _NOBODY)]
        prefills = sum(a.prefills for a in self._accounts.values())
        uncached = sum(a.uncached_tokens for a in self._accounts.values())
        sequences = sum(a.sequences for a in self._accounts.values())
        return [
            self._load(
                stats,
                _Account(prefills - own.prefills, uncached - own.uncached_tokens, sequences - own.sequences),
            )
            for own in (self._accounts[proxy] for proxy in range(len(listeners)))
        ]

    def _load(self, stats: Stats, others: _Account) -> Load:
        return Load(
            running=stats.running,
            waiting=stats.waiting,
            queued_tokens=stats.queued_tokens,
            kv_usage=stats.kv_usage,
            others_prefills=others.prefills,
            others_uncached_tokens=others.uncached_tokens,
            others_sequences=others.sequences,
            context_tokens=stats.context_tokens,
            steps=stats.steps,
            busy_ms=stats.busy_ms,
            computed_prompt_tokens=stats.computed_prompt_tokens,
        )

    def _reported(self, batch: Sequence[BlockEvent]) -> None:
        for listener in self._listeners:
            listener.reported(self.number, batch)
