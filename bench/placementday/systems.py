"""Who decides when to move which experts. All solvers, the load book and the economy are the service's own modules."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from omni_placement.economy import Costs, Decision, Rule, decide
from omni_placement.layout import Layout
from omni_placement.load import LoadBook, LoadRules, Phase, Window
from omni_placement.problem import Problem
from omni_placement.solvers import SOLVERS
from placementday.traffic import TICK_S, Counts, Tick


class System(Protocol):
    """`after` sees what a tick brought and returns the layout of the next one, or None to leave it."""

    plan_s: list[float]

    def after(self, index: int, tick: Tick, current: Layout) -> Layout | None: ...


def solve(name: str, problem: Problem, plan_s: list[float]) -> Layout:
    begun_s = time.perf_counter()
    layout = SOLVERS[name](problem)
    plan_s.append(time.perf_counter() - begun_s)
    return layout


@dataclass
class Never:
    plan_s: list[float] = field(default_factory=list)

    def after(self, index: int, tick: Tick, current: Layout) -> Layout | None:
        return None


@dataclass
class Every:
    """Re-plans from the counts of the last `window` ticks, every `period` ticks, and always moves."""

    solver: str
    period: int
    window: int
    plan_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._seen: deque[Counts] = deque(maxlen=self.window)

    def after(self, index: int, tick: Tick, current: Layout) -> Layout | None:
        self._seen.append(_total(tick))
        if (index + 1) % self.period:
            return None
        load = np.sum(self._seen, axis=0)
        return solve(self.solver, Problem(current.topology, load, current=current), self.plan_s)


@dataclass
class Once:
    """A static pattern from the counts of the first `window` ticks, and nothing after that."""

    solver: str
    window: int
    plan_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._every = Every(self.solver, self.window, self.window, self.plan_s)

    def after(self, index: int, tick: Tick, current: Layout) -> Layout | None:
        return self._every.after(index, tick, current) if index < self.window else None


@dataclass
class Service:
    """Load book, forecast and economy as the service has them; asked every `period` ticks.

    `by_class`: the engines' reports say to which class a token belongs. `economical`: publish by `decide`, or else
    always, which shows the forecast's part alone. `wary`: the solver is told the forecast's spread.
    """

    solver: str
    costs: Costs
    rules: LoadRules
    rule: Rule
    period: int = 2
    by_class: bool = False
    economical: bool = True
    wary: bool = False
    plan_s: list[float] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._book = LoadBook(self.rules)
        self._published_s = -np.inf

    def after(self, index: int, tick: Tick, current: Layout) -> Layout | None:
        # Reports come at the end of the tick, and belong to it.
        now_s = (index + 1) * TICK_S
        for name, tokens in (tick.counts if self.by_class else {"": _total(tick)}).items():
            window = Window("w", index, index, tokens.astype(np.int64), Phase.DECODE, name)
            self._book.add("m", "g", window, now_s - 1e-6)
        if (index + 1) % self.period:
            return None
        forecast = self._book.forecast("m", "g", self.rules.smoothing.horizon_s, now_s)
        if forecast is None:
            return None
        spread = forecast.spread if self.wary else None
        target = solve(self.solver, Problem(current.topology, forecast.load, spread, current), self.plan_s)
        if not self.economical:
            return target
        decision = decide(
            current,
            target,
            forecast,
            self.costs,
            self.rule,
            since_published_s=now_s - self._published_s,
            drift=self._book.drift("m", "g", now_s),
        )
        self.decisions.append(decision)
        if not decision.publish:
            return None
        self._published_s = now_s
        self._book.planned("m", "g", now_s)
        return decision.layout


@dataclass
class Oracle:
    """Knows the load of the tick to come; its moves are free. Re-plans every `period` ticks."""

    solver: str
    period: int = 2
    plan_s: list[float] = field(default_factory=list)

    def before(self, tick: Tick, current: Layout) -> Layout:
        return solve(self.solver, Problem(current.topology, tick.mean), self.plan_s)

    def after(self, index: int, tick: Tick, current: Layout) -> Layout | None:
        return None


def _total(tick: Tick) -> Counts:
    total: Counts = np.sum(list(tick.counts.values()), axis=0)
    return total
