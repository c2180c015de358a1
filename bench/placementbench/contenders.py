"""Everything that can lay out experts, behind one form."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from omni_placement.layout import EMPTY, Layout
from omni_placement.problem import Problem, Solver
from omni_placement.solvers import SOLVERS

OURS, DEEPSEEK, VLLM = "omni", "deepseek_eplb", "vllm"
Slots = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Contender:
    """`prepare` is given a problem and the slots this contender filled before; what it returns is timed. `slots` makes
    (layers, ranks, slots) of the answer."""

    prepare: Callable[[Problem, Slots | None], Callable[[], Any]]
    slots: Callable[[Problem, Any], Slots]


def contenders() -> dict[str, Contender]:
    """Every solver in SOLVERS, then vLLM's own policy; all on one thread."""
    numba.set_num_threads(1)
    return {**{name: _solver(solver) for name, solver in SOLVERS.items()}, VLLM: _vllm_policy()}


def _solver(solver: Solver) -> Contender:
    def prepare(problem: Problem, former: Slots | None) -> Callable[[], Layout]:
        current = None if former is None else Layout(problem.topology, former)
        asked = replace(problem, current=current)
        return lambda: solver(asked)

    return Contender(prepare, lambda problem, layout: layout.physical)


def _vllm_policy() -> Contender:
    """vLLM's default policy. It may put an expert on a rank twice, which is counted as vLLM does: two shares.

    It knows no ranks of the shared expert: it is asked about the others.
    """
    import torch
    from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

    torch.set_num_threads(1)

    def prepare(problem: Problem, former: Slots | None) -> Callable[[], Any]:
        topology = problem.topology
        ranks = np.flatnonzero(problem.capacity)
        hosts, slots = len(np.unique(topology.hosts[ranks])), len(ranks) * topology.slots_per_rank
        load = torch.from_numpy(np.array(problem.load))
        old = None if former is None else torch.from_numpy(former[:, ranks].reshape(-1, slots))
        return lambda: DefaultEplbPolicy.rebalance_experts(load, slots, topology.num_groups, hosts, len(ranks), old)

    def slots_of(problem: Problem, planned: Any) -> Slots:
        physical = np.full(problem.topology.shape, EMPTY, dtype=np.int32)
        ranks = np.flatnonzero(problem.capacity)
        physical[:, ranks] = planned.numpy().reshape(len(physical), len(ranks), -1)
        return physical

    return Contender(prepare, slots_of)
