"""One plan: which topology, which load, which solver, how even the result is, and whether going there pays."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from omni_common.errors import InvalidRequest
from omni_placement import economy
from omni_placement.book import IMPORTED, Exclusions, LayoutBook, Published
from omni_placement.layout import Layout, Topology, checked_capacity, checked_load
from omni_placement.load import Forecast
from omni_placement.load.book import GroupName
from omni_placement.migration import moved_bytes, rounds
from omni_placement.outlines import filled, same_outline, under
from omni_placement.problem import Loads, Pin, Problem
from omni_placement.reports import Reports
from omni_placement.rollout import Rollout
from omni_placement.solvers import SOLVERS
from omni_placement.solving.bound import lower_bound


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What to plan; None and "" leave the choice to the planner. `excluded_ranks` come on top of the group's. With
    `exact` nothing is solved: that layout is judged and published, `solver` being the name it is kept under."""

    name: GroupName
    topology: Topology | None = None
    load: Loads | None = None
    solver: str = ""
    publish: bool = False
    budget: int | None = None
    excluded_ranks: frozenset[int] = frozenset()
    pinned: tuple[Pin, ...] = ()
    max_replicas: int = 0
    exact: Layout | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """A problem and its answer. `forecast` is what was planned with; `is_reported` where it comes from reports.
    `failed_ranks`, of those excluded, can neither send nor receive."""

    problem: Problem
    solver: str
    layout: Layout
    forecast: Forecast
    is_reported: bool
    failed_ranks: frozenset[int]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """`version` is 0 where the plan was not put in force. Step loads are in tokens of the load planned with; what
    belongs to the layout in force is 0 and None where there is none of this topology."""

    name: GroupName
    version: int
    solver: str
    layout: Layout
    balancedness: npt.NDArray[np.float64]
    step_load: float
    current_step_load: float
    lower_bound: npt.NDArray[np.float64]
    moved_bytes: int
    num_rounds: int
    decision: economy.Decision | None


@dataclass(frozen=True, slots=True)
class Rules:
    """What plans of the service itself go by. `ms_per_token` of `costs` counts where a group's reports tell none."""

    solver: str
    horizon_s: float
    budget: int | None
    costs: economy.Costs
    rule: economy.Rule


class Planner:
    """Plans with the load given, else with the forecast from reports, else as if all experts were equally busy."""

    def __init__(
        self, layouts: LayoutBook, rollout: Rollout, reports: Reports, rules: Rules, clock: Callable[[], float]
    ) -> None:
        self._layouts, self._rollout, self._reports = layouts, rollout, reports
        self._rules, self._clock = rules, clock

    async def warm_up(self) -> None:
        """Solve a small problem, so that solvers which are compiled on first use are ready before they are needed."""
        topology = Topology(1, 4, 2, 3)
        load = np.array([[1, 2, 3, 4]], dtype=np.float64)
        current = SOLVERS["identity"](Problem(topology, load))
        problem = Problem(topology, load, load, current)
        await asyncio.to_thread(SOLVERS[self._rules.solver], problem)
        await asyncio.to_thread(lower_bound, problem)

    async def plan(self, question: Question) -> Plan:
        """Solve, and publish where asked.

        Raises:
            InvalidRequest: no such solver, a problem that cannot be solved, a load of another shape.
            NotFound: no topology was given and none is in force.
            FailedPrecondition: a migration is under way, or experts are on failed ranks only.
        """
        name = question.name
        solved = await self.solve(question)
        plan = await asyncio.to_thread(self._judged, name, solved, not question.publish)
        if not question.publish:
            return plan
        published = await self._rollout.publish(name, solved.layout, solved.solver, "requested")
        if solved.is_reported:
            self._reports.planned(name)
        session = self._rollout.session(name)
        num_rounds = len(session.order.rounds) if session and session.order else 0
        return replace(plan, version=published.version, layout=published.layout, num_rounds=num_rounds)

    async def solve(self, question: Question, exclusions: Exclusions | None = None) -> Solved:
        """The problem a question stands for, and its answer. `exclusions` stand in for the group's own. Raises as
        `plan`."""
        exact = question.exact
        solver = question.solver or (self._rules.solver if exact is None else IMPORTED)
        if exact is None and solver not in SOLVERS:
            raise InvalidRequest(f"no solver {solver!r}; there are {', '.join(SOLVERS)}", field="solver")
        topology = self._topology(question)
        forecast, is_reported = self._forecast(question, topology)
        known = self._layouts.find(question.name)
        out = exclusions or self._layouts.exclusions(question.name)
        problem = Problem(
            topology,
            forecast.load,
            # Doubt is weighed once, where it is decided whether a plan pays (`economy`): a simulated day with it here
            # too took 0.1% longer and moved 7% more.
            None,
            under(topology, known.layout) if known else None,
            question.budget,
            question.pinned,
            question.excluded_ranks | out.ranks,
            question.max_replicas,
        )
        if exact is None:
            layout = await asyncio.to_thread(SOLVERS[solver], problem)
        else:
            layout = _checked(Layout(topology, exact.physical), problem.excluded_ranks)
        return Solved(problem, solver, layout, forecast, is_reported, out.silent)

    async def rebalanced(self, name: GroupName) -> tuple[Solved, economy.Decision | None]:
        """A plan for the forecast, and whether to go there from the layout in force. Raises as `plan`."""
        solved = await self.solve(Question(name, budget=self._rules.budget))
        return solved, await asyncio.to_thread(self._decision, name, solved)

    async def replan(self, name: GroupName, exclusions: Exclusions, reason: str, failed_version: int = 0) -> Published:
        """Put a layout without these ranks in force, whatever is under way. Raises as `plan`."""
        solved = await self.solve(Question(name, budget=self._rules.budget), exclusions)
        published = await self._rollout.publish(
            name,
            solved.layout,
            solved.solver,
            reason,
            exclusions=exclusions,
            failed_version=failed_version,
            is_urgent=True,
        )
        if solved.is_reported:
            self._reports.planned(name)
        return published

    async def ensure(self, name: GroupName, topology: Topology) -> Published:
        """The layout in force, made the identity layout if there is none of this topology."""
        known = self._layouts.find(name)
        if known is not None and same_outline(known.layout.topology, topology):
            told = filled(topology, known.layout.topology)
            return known if told == known.layout.topology else await self._layouts.describe(name, told)
        layout = SOLVERS["identity"](Problem(topology, _uniform(topology)))
        return await self._rollout.publish(name, layout, "identity", "configured")

    def _topology(self, question: Question) -> Topology:
        """The topology asked for, its details taken from the layout in force where the question leaves them out."""
        asked = question.exact.topology if question.exact else question.topology
        if asked is None:
            return self._layouts.get(question.name).layout.topology
        known = self._layouts.find(question.name)
        if known is None or not same_outline(known.layout.topology, asked):
            return asked
        return filled(asked, known.layout.topology)

    def _forecast(self, question: Question, topology: Topology) -> tuple[Forecast, bool]:
        """What to plan with, and whether it comes from reports."""
        reported = self._reports.forecast(question.name) if question.load is None else None
        if reported is not None:
            checked_load(topology, reported.load)
            return reported, True
        load = _uniform(topology) if question.load is None else checked_load(topology, question.load)
        return Forecast(load.astype(np.float64), np.zeros(load.shape), self._rules.horizon_s, None), False

    def _judged(self, name: GroupName, solved: Solved, counts_rounds: bool) -> Plan:
        problem, layout, load = solved.problem, solved.layout, solved.forecast.load
        known = self._layouts.find(name)
        held = under(problem.topology, self._rollout.held(name)) if known else None
        steps = rounds(held, layout, solved.failed_ranks) if held and counts_rounds else ()
        return Plan(
            name,
            0,
            solved.solver,
            layout,
            layout.balancedness(load, problem.excluded_ranks),
            layout.step_load(load),
            problem.current.step_load(load) if problem.current else 0.0,
            lower_bound(problem),
            moved_bytes(held, layout) if held else 0,
            len(steps),
            self._decision(name, solved),
        )

    def _decision(self, name: GroupName, solved: Solved) -> economy.Decision | None:
        """Whether the answer pays against the layout in force; None where that is of another topology."""
        rules, current, known = self._rules, solved.problem.current, self._layouts.find(name)
        if current is None or known is None:
            return None
        told = self._reports.ms_per_token(name)
        costs = rules.costs if told is None else replace(rules.costs, ms_per_token=told)
        return economy.decide(
            current,
            solved.layout,
            solved.forecast,
            costs,
            rules.rule,
            since_published_s=self._clock() - known.published_at_s,
            drift=self._reports.drift(name),
            budget=solved.problem.budget,
        )


def _checked(layout: Layout, excluded_ranks: frozenset[int]) -> Layout:
    """The layout, if it leaves empty what must be empty. Raises `InvalidRequest` naming the first place."""
    used = [rank for rank in sorted(excluded_ranks) if layout.indicator[rank].any()]
    if used:
        raise InvalidRequest(f"excluded ranks {used} hold experts", field="exact", reason="excluded_rank")
    return checked_capacity(layout)


def _uniform(topology: Topology) -> Loads:
    return np.ones((topology.num_layers, topology.num_experts))
