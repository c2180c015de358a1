"""One cell of the comparison: a system, spare slots, a family of loads, and every contender on it."""

import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from omni_placement.layout import EMPTY, Topology
from omni_placement.problem import Problem
from omni_placement.solving.bound import lower_bound
from placementbench.contenders import VLLM, Contender, Slots
from placementbench.families import FAMILIES, Loads, Shape
from placementbench.router import Routed
from placementbench.shapes import System


class Wrong(Exception):
    """A contender's answer is no layout, or better than was proven possible."""


@dataclass(frozen=True, slots=True)
class Cell:
    system: System
    extra: int
    family: str

    def __str__(self) -> str:
        return f"{self.system.name}, {self.extra} extra, {self.family}"


@dataclass(frozen=True, slots=True, eq=False)
class Times:
    """Seconds of every repeat, by the clock and of this process's CPU."""

    wall_s: list[float]
    cpu_s: list[float]

    def of(self, call: Callable[[], Any]) -> Any:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        answer = call()
        self.wall_s.append(time.perf_counter() - wall_s)
        self.cpu_s.append(time.process_time() - cpu_s)
        return answer

    def figures(self) -> dict[str, float]:
        return {"wall_ms": 1e3 * float(np.median(self.wall_s)), "cpu_ms": 1e3 * float(np.median(self.cpu_s))}


def measure(
    cell: Cell, contenders: Mapping[str, Contender], routed: Routed, repeats: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Figures of each contender: a plan from nothing, timed, and plans after the load drifted.

    `gap` is the step load over the lower bound, less 1. `below_bound` counts layers better than the bound, which only
    an expert twice on a rank can make, as vLLM's policy allows.

    Raises:
        Wrong: an answer is no layout, or better than the bound.
    """
    topology = cell.system.topology(cell.extra)
    random = np.random.default_rng([seed, zlib.crc32(str(cell).encode())])
    shape = Shape(topology.num_layers, topology.num_experts, cell.system.ranks)
    drift = FAMILIES[cell.family](shape, random, routed)
    before = Problem(topology, drift.before)
    calls = {name: contender.prepare(before, None) for name, contender in contenders.items()}
    slots = {name: contender.slots(before, calls[name]()) for name, contender in contenders.items()}
    times = {name: Times([], []) for name in contenders}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].of(call)
    bound = lower_bound(before)
    results: dict[str, dict[str, Any]] = {
        name: {
            **_quality(topology, slots[name], drift.before, bound),
            **times[name].figures(),
            "at_home": at_home(topology, slots[name]),
            "soon": _replan(contender, topology, slots[name], drift.soon),
            "later": _replan(contender, topology, slots[name], drift.later),
        }
        for name, contender in contenders.items()
    }
    for name, figures in results.items():
        if name != VLLM and any(part["below_bound"] for part in (figures, figures["soon"], figures["later"])):
            raise Wrong(f"{name} is better than the lower bound in {cell}")
    return results


def _replan(contender: Contender, topology: Topology, former: Slots, load: Loads) -> dict[str, float]:
    """From the contender's own layout; `stale_balance` is that one's under the load as it has become."""
    problem, times = Problem(topology, load), Times([], [])
    slots = contender.slots(problem, times.of(contender.prepare(problem, former)))
    bound, moved = lower_bound(problem), new_copies(topology, former, slots)
    return {
        **_quality(topology, slots, load, bound),
        **times.figures(),
        "stale_balance": _quality(topology, former, load, bound)["balance"],
        "moved_experts": moved,
        "moved_bytes": moved * topology.expert_bytes,
    }


def _quality(topology: Topology, slots: Slots, load: Loads, bound: Loads) -> dict[str, float]:
    loads = rank_loads(topology, slots, load)[:, topology.capacity > 0]
    slowest = loads.max(axis=1)
    balance = loads.mean(axis=1) / slowest
    return {
        "balance": float(balance.mean()),
        "worst_layer": float(balance.min()),
        "step_load": float(slowest.sum()),
        "gap": float(slowest.sum() / bound.sum() - 1.0),
        "below_bound": int((slowest < bound * (1 - 1e-9)).sum()),
    }


def rank_loads(topology: Topology, slots: Slots, load: Loads) -> npt.NDArray[np.float64]:
    """Tokens each rank computes, (layers, ranks): every filled slot has an equal share of its expert.

    Counted here, apart from the product's own count. An expert that fills two slots of a rank has two shares there.

    Raises:
        Wrong: an expert has no slot.
    """
    counts = np.zeros(load.shape)
    layers, ranks, places = np.nonzero(slots != EMPTY)
    experts = slots[layers, ranks, places]
    np.add.at(counts, (layers, experts), 1)
    if (counts == 0).any():
        raise Wrong("an expert is on no rank")
    loads = np.zeros((topology.num_layers, topology.num_ranks))
    np.add.at(loads, (layers, ranks), load[layers, experts] / counts[layers, experts])
    return loads


def new_copies(topology: Topology, former: Slots, slots: Slots) -> int:
    """Copies (layer, rank, expert) that a rank has to be sent: it holds them in `slots`, not in `former`."""
    return int((_held(topology, slots) & ~_held(topology, former)).sum())


def at_home(topology: Topology, slots: Slots) -> float:
    """Share of a group's experts on the host that has most of them, mean over layers and groups; 1 with one host."""
    held = _held(topology, slots)
    on_host = np.stack([held[:, topology.hosts == host].any(axis=1) for host in np.unique(topology.hosts)], axis=1)
    in_group = on_host.reshape(*on_host.shape[:2], topology.num_groups, -1).mean(axis=3)
    return float(in_group.max(axis=1).mean())


def _held(topology: Topology, slots: Slots) -> npt.NDArray[np.bool_]:
    held = np.zeros((topology.num_layers, topology.num_ranks, topology.num_experts), dtype=bool)
    layers, ranks, places = np.nonzero(slots != EMPTY)
    held[layers, ranks, slots[layers, ranks, places]] = True
    return held
