"""What a solver is asked: a load, the ranks there are, and what must hold. A problem that exists can be solved."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from omni_common.errors import InvalidRequest
from omni_placement.layout import Layout, Numbers, Topology, checked_load
from omni_placement.outlines import same_outline

Loads = npt.NDArray[np.float64]
Pin = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Problem:
    """`load` is float64 (layers, experts), tokens expected of each expert; `spread` its standard deviation.

    `current` is the layout in force, to be left with few moves. `budget` bounds the copies beyond one per expert, over
    all layers together; None is every slot there is. `pinned` are (layer, expert, rank) that must hold.
    `excluded_ranks` hold nothing. `max_replicas` bounds the copies of an expert in a layer; 0 does not.

    Raises:
        InvalidRequest: no layout can satisfy this; field and message name what cannot be.
    """

    topology: Topology
    load: Loads
    spread: Loads | None = None
    current: Layout | None = None
    budget: int | None = None
    pinned: tuple[Pin, ...] = ()
    excluded_ranks: frozenset[int] = frozenset()
    max_replicas: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "load", _floats(checked_load(self.topology, self.load)))
        if self.spread is not None:
            if self.spread.shape != self.load.shape or not (self.spread >= 0).all():
                raise _infeasible("spread", f"must be {self.load.shape} numbers that are not negative")
            object.__setattr__(self, "spread", _floats(self.spread))
        if self.current is not None and not same_outline(self.current.topology, self.topology):
            raise _infeasible("current", "has other layers, experts, ranks or slots than the topology")
        object.__setattr__(self, "pinned", tuple(sorted(set(self.pinned))))
        object.__setattr__(self, "excluded_ranks", frozenset(self.excluded_ranks))
        for name in ("budget", "max_replicas"):
            if (getattr(self, name) or 0) < 0:
                raise _infeasible(name, "must not be negative")
        self._check_ranks()
        self._check_pins()

    @property
    def capacity(self) -> Numbers:
        """Slots of a layer that may be used on each rank, (ranks,); none on ranks excluded or of the shared expert."""
        slots = self.topology.capacity.copy()
        slots[list(self.excluded_ranks)] = 0
        return slots

    @property
    def replica_limit(self) -> int:
        """Copies an expert can have in a layer: one on each usable rank, at most `max_replicas`."""
        ranks = int((self.capacity > 0).sum())
        return min(ranks, self.max_replicas) if self.max_replicas else ranks

    @property
    def extra_replicas(self) -> int:
        """Copies beyond one per expert that there may be over all layers: the budget, or what the slots allow."""
        topology = self.topology
        most = min(int(self.capacity.sum()), topology.num_experts * self.replica_limit) - topology.num_experts
        return min(most * topology.num_layers, self.budget if self.budget is not None else most * topology.num_layers)

    def _check_ranks(self) -> None:
        ranks, experts = self.topology.num_ranks, self.topology.num_experts
        if any(not 0 <= rank < ranks for rank in self.excluded_ranks):
            raise _infeasible("excluded_ranks", f"names ranks beyond 0 to {ranks - 1}")
        if (slots := int(self.capacity.sum())) < experts:
            raise _infeasible("excluded_ranks", f"leaves {slots} slots a layer for {experts} experts")

    def _check_pins(self) -> None:
        if not self.pinned:
            return
        pins = np.array(self.pinned, dtype=np.int64)
        shape = self.topology.num_layers, self.topology.num_experts, self.topology.num_ranks
        if (outside := ((pins < 0) | (pins >= shape)).any(axis=1)).any():
            raise _infeasible("pinned", f"{_pin(pins[outside][0])} does not exist")
        held = np.zeros((shape[0], shape[2]), dtype=np.int64)
        copies = np.zeros((shape[0], shape[1]), dtype=np.int64)
        np.add.at(held, (pins[:, 0], pins[:, 2]), 1)
        np.add.at(copies, (pins[:, 0], pins[:, 1]), 1)
        if (over := held > self.capacity).any():
            layer, rank = np.argwhere(over)[0]
            message = f"{held[layer, rank]} experts of layer {layer} on rank {rank}, of {self.capacity[rank]} slots"
            raise _infeasible("pinned", message)
        if (over := copies > self.replica_limit).any():
            layer, expert = np.argwhere(over)[0]
            message = f"{copies[layer, expert]} copies of expert {expert} of layer {layer}, of {self.replica_limit}"
            raise _infeasible("pinned", message)
        extra = np.maximum(copies - 1, 0).sum(axis=1)
        if (over := extra > self.capacity.sum() - shape[1]).any():
            raise _infeasible("pinned", f"leave no slot for some expert of layer {np.argmax(over)}")
        if self.budget is not None and extra.sum() > self.budget:
            raise _infeasible("budget", f"{self.budget} is less than the {extra.sum()} copies that pins ask for")


Solver = Callable[[Problem], Layout]
"""Deterministic and pure. Raises `InvalidRequest` where it cannot honour a part of the problem."""


def refuse(problem: Problem, solver: str, *fields: str) -> None:
    """Raise `InvalidRequest` where the problem uses one of `fields`, which the solver cannot honour."""
    for name in fields:
        if getattr(problem, name):
            raise InvalidRequest(f"solver {solver!r} does not know {name}", field=name, reason="unsupported")


def _floats(array: npt.NDArray[np.generic]) -> Loads:
    floats = np.array(array, dtype=np.float64, order="C")
    floats.setflags(write=False)
    return floats


def _pin(pin: Numbers) -> str:
    return "expert {1} of layer {0} on rank {2}".format(*pin.tolist())


def _infeasible(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {message}", field=field, reason=f"infeasible_{field}")
