"""Solvers: load and topology in, layout out. Pure; a new one is a function and a line in `SOLVERS`."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from omni_placement.layout import EMPTY, Layout, Load, Topology


class Solver(Protocol):
    """`load` is int64 (layers, experts); `current` is the layout in force, where there is one of this topology."""

    def __call__(self, topology: Topology, load: Load, current: Layout | None) -> Layout: ...


def identity(topology: Topology, load: Load, current: Layout | None) -> Layout:
    """Experts in order, in runs of nearly equal length; spare slots stay empty. What an engine starts with."""
    rank = np.full((topology.num_ranks, topology.slots_per_rank), EMPTY, dtype=np.int32)
    for index, run in enumerate(np.array_split(np.arange(topology.num_experts), topology.num_ranks)):
        rank[index, : len(run)] = run
    return _same_in_every_layer(topology, rank)


def round_robin(topology: Topology, load: Load, current: Layout | None) -> Layout:
    """Experts dealt to ranks in turn, then dealt again into the spare slots; a rank skips what it holds."""
    rank = np.full((topology.num_ranks, topology.slots_per_rank), EMPTY, dtype=np.int32)
    expert = 0
    for slot in range(topology.slots_per_rank):
        for index in range(topology.num_ranks):
            held = rank[index, :slot]
            free = (e % topology.num_experts for e in range(expert, expert + topology.num_experts))
            chosen = next((e for e in free if e not in held), EMPTY)
            rank[index, slot] = chosen
            expert = expert if chosen == EMPTY else chosen + 1
    return _same_in_every_layer(topology, rank)


def _same_in_every_layer(topology: Topology, rank: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> Layout:
    return Layout(topology, np.broadcast_to(rank, topology.shape))


SOLVERS: Mapping[str, Solver] = {"identity": identity, "round_robin": round_robin}
