"""The table of solvers: a problem in, a layout out."""

from collections.abc import Mapping

import numpy as np

from omni_placement.baselines import deepseek_eplb, greedy_lpt
from omni_placement.layout import EMPTY, Layout
from omni_placement.problem import Problem, Solver, refuse
from omni_placement.solving import omni


def identity(problem: Problem) -> Layout:
    """Experts in order, in runs as equal as slots allow; spare slots stay empty. What an engine starts with."""
    refuse(problem, "identity", "pinned")
    topology = problem.topology
    slots = np.arange(topology.slots_per_rank)[:, None] < problem.capacity
    lengths = np.bincount(np.nonzero(slots)[1][: topology.num_experts], minlength=topology.num_ranks)
    rank = np.full((topology.num_ranks, topology.slots_per_rank), EMPTY, dtype=np.int32)
    first = 0
    for index, length in enumerate(lengths.tolist()):
        rank[index, :length] = np.arange(first, first + length)
        first += length
    return Layout(topology, np.broadcast_to(rank, topology.shape))


def round_robin(problem: Problem) -> Layout:
    """Experts dealt to ranks in turn, then dealt again into the spare slots; a rank skips what it holds."""
    refuse(problem, "round_robin", "pinned", "max_replicas")
    topology = problem.topology
    rank = np.full((topology.num_ranks, topology.slots_per_rank), EMPTY, dtype=np.int32)
    copies = topology.num_experts + problem.extra_replicas // topology.num_layers
    expert = 0
    for slot in range(topology.slots_per_rank):
        for index in np.flatnonzero(problem.capacity > slot)[: max(copies, 0)]:
            held = rank[index, :slot]
            free = (e % topology.num_experts for e in range(expert, expert + topology.num_experts))
            chosen = next((e for e in free if e not in held), EMPTY)
            rank[index, slot] = chosen
            if chosen != EMPTY:
                expert, copies = chosen + 1, copies - 1
    return Layout(topology, np.broadcast_to(rank, topology.shape))


SOLVERS: Mapping[str, Solver] = {
    "omni": omni,
    "deepseek_eplb": deepseek_eplb,
    "greedy_lpt": greedy_lpt,
    "round_robin": round_robin,
    "identity": identity,
}
