"""Solving on this machine: what was asked as a problem, timed solvers, and the study of the answers."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from omni_common.errors import FailedPrecondition, InvalidRequest
from omni_placement.commands.options import numbers, repeated
from omni_placement.layout import Topology
from omni_placement.migration import rounds
from omni_placement.problem import Loads, Problem
from omni_placement.report.study import Measured, Study
from omni_placement.solvers import SOLVERS
from omni_placement.solving.bound import lower_bound


@dataclass(frozen=True, slots=True)
class Shape:
    """Ranks and slots as written on the command line; None and "" leave it to `known` or to the load."""

    ranks: int | None = None
    slots: int | None = None
    ranks_per_host: int = 0
    rank_slots: str | None = None
    shared_ranks: str | None = None
    groups: int = 1
    expert_bytes: int = 0


def topology_of(shape: Shape, load: Loads, known: Topology | None) -> Topology:
    """The topology meant: `known` with what was written in its place.

    Raises:
        InvalidRequest: no ranks were given and none are known, or the experts do not fit.
    """
    layers, experts = load.shape
    ranks = shape.ranks or (known.num_ranks if known is not None else 0)
    if not ranks:
        raise InvalidRequest("how many ranks are there? Give --ranks, or --current layout.npy", field="--ranks")
    shared = numbers(shape.shared_ranks, "--shared-ranks") or (known.shared_ranks if known is not None else ())
    caps = repeated(shape.rank_slots, "--rank-slots") or (known.rank_slots if known is not None else ())
    slots = shape.slots or (known.slots_per_rank if known is not None else max(caps, default=0))
    usable = max(ranks - len({rank for rank in shared if rank < ranks}), 1)
    return Topology(
        layers,
        experts,
        ranks,
        slots or -(-experts // usable) + 1,
        shape.ranks_per_host or (known.ranks_per_host if known is not None else 0),
        caps,
        shared,
        shape.groups if shape.groups > 1 or known is None else known.num_groups,
        shape.expert_bytes or (known.expert_bytes if known is not None else 0),
    )


def solve(problem: Problem, name: str) -> Measured:
    """A solver's layout and its time, without that of compiling it.

    Raises:
        InvalidRequest: no such solver, or one that cannot honour a part of the problem.
    """
    if name not in SOLVERS:
        raise InvalidRequest(f"no solver {name!r}; there are {', '.join(SOLVERS)}", field="--solver")
    SOLVERS[name](_small())
    started = time.perf_counter()
    layout = SOLVERS[name](problem)
    return Measured(name, layout, problem, time.perf_counter() - started)


def start(problem: Problem) -> Measured:
    """What moves are counted from: the layout in force, else experts in order, one copy each."""
    if problem.current is not None:
        return Measured("in force", problem.current, problem)
    bare = replace(problem, pinned=(), budget=None, max_replicas=0, spread=None)
    return Measured("identity", SOLVERS["identity"](bare), problem)


def study(title: str, before: Measured, after: Measured, others: Sequence[Measured] = ()) -> Study:
    """`after` beside the bound and `before`, and the rounds between them where there is a way."""
    problem = after.problem
    try:
        steps = rounds(before.layout, after.layout, problem.excluded_ranks)
    except FailedPrecondition:
        # An expert that only excluded ranks hold is loaded from its checkpoint, not moved.
        steps = None
    return Study(title, problem, before, after, lower_bound(problem), steps, others)


def drawing() -> ModuleType:
    """`omni_placement.report.files`, imported when something is drawn: matplotlib takes a while.

    Raises:
        FailedPrecondition: it is not installed.
    """
    try:
        return import_module("omni_placement.report.files")
    except ModuleNotFoundError as error:
        message = f"figures need {error.name}, which is not installed; pip install 'omni-placement[cli]'"
        raise FailedPrecondition(message, reason="not_installed") from error


class Steps:
    """Says on the terminal what is being done, and for how long; nothing where output is no terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._task = progress, progress.add_task("", total=None)

    def say(self, text: str) -> None:
        self._progress.update(self._task, description=text)


@contextmanager
def steps() -> Iterator[Steps]:
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Steps(progress)


def _small() -> Problem:
    """Compiled solvers compile on their first problem."""
    topology, load = Topology(1, 4, 2, 3), np.array([[4.0, 3.0, 2.0, 1.0]])
    return Problem(topology, load, current=SOLVERS["identity"](Problem(topology, load)))
