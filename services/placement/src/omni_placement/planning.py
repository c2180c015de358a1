"""One plan: which topology, which load, which solver, and how even the result is."""

import asyncio
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from omni_common.errors import InvalidRequest
from omni_placement.book import LayoutBook, Published
from omni_placement.layout import Layout, Load, Topology, checked_load
from omni_placement.solvers import SOLVERS
from omni_placement.windows import LoadBook


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What to plan; None and "" leave the choice to the planner."""

    model: str
    topology: Topology | None
    load: Load | None
    solver: str
    publish: bool


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """`version` is 0 where the plan was not put in force."""

    model: str
    version: int
    solver: str
    layout: Layout
    balancedness: npt.NDArray[np.float64]


class Planner:
    """Plans with the load given, else with the load reported, else as if every expert were equally busy."""

    def __init__(self, layouts: LayoutBook, loads: LoadBook, default_solver: str) -> None:
        self._layouts, self._loads, self._default_solver = layouts, loads, default_solver

    async def plan(self, question: Question) -> Plan:
        """Solve, and publish where asked.

        Raises:
            InvalidRequest: no such solver, a topology that cannot hold the experts, a load of another shape.
            NotFound: no topology was given and none is in force.
        """
        name = question.solver or self._default_solver
        if name not in SOLVERS:
            raise InvalidRequest(f"no solver {name!r}; there are {', '.join(SOLVERS)}", field="solver")
        topology = question.topology or self._layouts.get(question.model).layout.topology
        load = self._load(question, topology)
        known = self._layouts.find(question.model)
        current = known.layout if known and known.layout.topology == topology else None
        layout = await asyncio.to_thread(SOLVERS[name], topology, load, current)
        version = 0
        if question.publish:
            version = (await self._layouts.publish(question.model, layout, name)).version
        return Plan(question.model, version, name, layout, layout.balancedness(load))

    async def ensure(self, model: str, topology: Topology) -> Published:
        """The layout in force, made the identity layout if there is none of this topology."""
        known = self._layouts.find(model)
        if known is not None and known.layout.topology == topology:
            return known
        layout = SOLVERS["identity"](topology, _uniform(topology), None)
        return await self._layouts.publish(model, layout, "identity")

    def _load(self, question: Question, topology: Topology) -> Load:
        if question.load is not None:
            return checked_load(topology, question.load)
        reported = self._loads.total(question.model)
        return _uniform(topology) if reported is None else checked_load(topology, reported)


def _uniform(topology: Topology) -> Load:
    return np.ones((topology.num_layers, topology.num_experts), dtype=np.int64)
