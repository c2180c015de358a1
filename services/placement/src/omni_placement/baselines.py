"""Known ways to lay out experts, kept to compare with. Deterministic; loads are tokens, arrays are (layers, ...).

`deepseek_eplb` follows the published description of DeepSeek's Expert Parallelism Load Balancer
(https://github.com/deepseek-ai/eplb, README). `greedy_lpt` is the step most other balancers share: replicas by largest
share, then longest processing time first. Slots beyond one per expert are the same number in every layer.
"""

import numpy as np
import numpy.typing as npt

from omni_common.errors import InvalidRequest
from omni_placement.layout import EMPTY, Layout, Numbers, Topology
from omni_placement.problem import Loads, Problem, refuse


def deepseek_eplb(problem: Problem) -> Layout:
    """Hierarchical where the hosts divide the expert groups, else global, over the ranks that hold routed experts.

    The description lets a rank hold two replicas of one expert, a layout does not: the second one changes places with
    the replica nearest in load on another rank (of its host), or its slot stays empty where no rank can take it.

    Raises:
        InvalidRequest: pins, a cap on replicas, ranks of unlike size, or slots that do not divide by the ranks.
    """
    refuse(problem, "deepseek_eplb", "pinned", "max_replicas")
    topology = problem.topology
    ranks, capacity = _usable(problem)
    if (capacity != capacity[0]).any():
        raise _unsupported("topology.rank_slots", "ranks of unlike size")
    slots = int(capacity[0])
    if problem.budget is not None:
        experts = topology.num_experts + problem.budget // topology.num_layers
        slots = min(slots, experts // len(ranks))
        if slots * len(ranks) < topology.num_experts:
            raise _unsupported("budget", f"{experts} slots a layer, which do not divide by {len(ranks)} ranks")
    hosts, per_host = np.unique(topology.hosts[ranks], return_counts=True)
    is_hierarchical = (per_host == per_host[0]).all() and topology.num_groups % len(hosts) == 0
    num_groups, num_hosts = (topology.num_groups, len(hosts)) if is_hierarchical else (1, 1)
    replicas = eplb_replicas(problem.load, slots * len(ranks), num_groups, num_hosts, len(ranks))
    _part_repeats(replicas.reshape(topology.num_layers * num_hosts, -1, slots), problem.load)
    return _layout(topology, ranks, replicas.reshape(topology.num_layers, len(ranks), slots))


def eplb_replicas(load: Loads, num_slots: int, num_groups: int, num_hosts: int, num_ranks: int) -> Numbers:
    """The expert in each slot, (layers, slots), rank by rank; a rank may hold an expert more than once.

    Groups are packed onto hosts, experts replicated within a host, replicas packed onto its ranks. One group on one
    host is the global policy. Hosts divide groups and ranks, ranks divide slots.
    """
    layers, num_experts = load.shape
    by_group = load.reshape(layers, num_groups, -1)
    groups = _pack(by_group.sum(axis=2), num_hosts)
    experts = np.arange(num_experts).reshape(num_groups, -1)[groups].reshape(layers * num_hosts, -1)
    host_load = np.take_along_axis(np.repeat(load, num_hosts, axis=0), experts, axis=1)
    replicas, share = _replicate(host_load, num_slots // num_hosts)
    packed = np.take_along_axis(replicas, _pack(share, num_ranks // num_hosts), axis=1)
    return np.take_along_axis(experts, packed, axis=1).reshape(layers, num_slots)


def _replicate(load: Loads, num_slots: int) -> tuple[Numbers, Loads]:
    """Expert and share of load of each slot: one slot each, then always one more to the largest share."""
    rows, num_experts = load.shape
    counts = np.ones((rows, num_experts))
    replicas = np.tile(np.arange(num_slots), (rows, 1))
    every = np.arange(rows)
    for slot in range(num_experts, num_slots):
        largest = np.argmax(load / counts, axis=1)
        replicas[:, slot] = largest
        counts[every, largest] += 1
    return replicas, np.take_along_axis(load / counts, replicas, axis=1)


def _pack(weight: Loads, num_packs: int) -> Numbers:
    """Items in order of the pack they go to, (rows, items): heaviest first into the lightest pack with room left."""
    rows, num_items = weight.shape
    room = num_items // num_packs
    if room == 1:
        return np.tile(np.arange(num_items), (rows, 1))
    order = np.argsort(-weight, axis=1, kind="stable")
    total, filled = np.zeros((rows, num_packs)), np.zeros((rows, num_packs), dtype=np.int64)
    packs = np.empty((rows, num_packs, room), dtype=np.int64)
    every = np.arange(rows)
    for item in order.T:
        lightest = np.argmin(total, axis=1)
        place = filled[every, lightest]
        packs[every, lightest, place] = item
        total[every, lightest] += weight[every, item]
        filled[every, lightest] += 1
        total[every[place == room - 1], lightest[place == room - 1]] = np.inf
    return packs.reshape(rows, num_items)


def greedy_lpt(problem: Problem) -> Layout:
    """Replicas to the largest share, then each replica, heaviest first, to the least loaded rank that has room and
    does not hold the expert. A replica for which there is no such rank is left out.

    Raises:
        InvalidRequest: pins.
    """
    refuse(problem, "greedy_lpt", "pinned")
    topology = problem.topology
    ranks, capacity = _usable(problem)
    extra = problem.extra_replicas // topology.num_layers
    counts = _counts(problem.load, topology.num_experts + extra, problem.replica_limit)
    return _layout(topology, ranks, _spread(problem.load, counts, capacity, topology.slots_per_rank))


def _counts(load: Loads, num_slots: int, cap: int) -> Numbers:
    """Copies of each expert: (layers, experts), at most `cap`."""
    counts = np.ones(load.shape, dtype=np.int64)
    every = np.arange(len(load))
    for _ in range(num_slots - load.shape[1]):
        share = np.where(counts < cap, load / counts, -1.0)
        counts[every, np.argmax(share, axis=1)] += 1
    return counts


def _spread(load: Loads, counts: Numbers, capacity: Numbers, slots_per_rank: int) -> Numbers:
    """(layers, ranks, slots): first copies and further ones alike, in order of their share."""
    layers, num_experts = load.shape
    num_ranks, every = len(capacity), np.arange(layers)
    copies = np.stack([np.repeat(np.arange(num_experts), row) for row in counts])
    share = np.take_along_axis(load / counts, copies, axis=1)
    order = np.argsort(-share, axis=1, kind="stable")
    total, filled = np.zeros((layers, num_ranks)), np.zeros((layers, num_ranks), dtype=np.int64)
    holds = np.zeros((layers, num_ranks, num_experts), dtype=bool)
    held = np.full((layers, num_ranks, slots_per_rank), EMPTY, dtype=np.int64)
    for item in order.T:
        expert = copies[every, item]
        closed = (filled >= capacity) | holds[every, :, expert]
        rank = np.argmin(np.where(closed, np.inf, total), axis=1)
        fits = ~closed[every, rank]
        at = every[fits], rank[fits]
        held[(*at, filled[at])] = expert[fits]
        holds[(*at, expert[fits])] = True
        total[at] += share[every, item][fits]
        filled[at] += 1
    return held


def _usable(problem: Problem) -> tuple[Numbers, Numbers]:
    """The ranks that may hold routed experts, and the slots of each."""
    ranks = np.flatnonzero(problem.capacity)
    return ranks, problem.capacity[ranks]


def _part_repeats(held: Numbers, load: Loads) -> None:
    """Make every expert be at most once on a rank, in place: (layers x hosts, ranks, slots)."""
    load = np.repeat(load, len(held) // len(load), axis=0)
    for row, rank, slot in np.argwhere(_repeats(held)):
        here, expert = held[row], held[row, rank, slot]
        if (here[rank] == expert).sum() < 2:
            continue
        share = load[row] / np.maximum(1, np.bincount(here[here != EMPTY], minlength=load.shape[1]))
        fits = (here != EMPTY) & ~(here == expert).any(axis=1, keepdims=True) & ~np.isin(here, here[rank])
        if not fits.any():
            here[rank, slot] = EMPTY
            continue
        distance = np.where(fits, np.abs(share[here] - share[expert]), np.inf)
        other = np.unravel_index(np.argmin(distance), here.shape)
        here[rank, slot], here[other] = here[other], expert


def _repeats(held: Numbers) -> npt.NDArray[np.bool_]:
    """Where a slot holds what an earlier one of its rank does."""
    again = np.zeros(held.shape, dtype=bool)
    for slot in range(1, held.shape[2]):
        again[:, :, slot] = (held[:, :, :slot] == held[:, :, slot, None]).any(axis=2)
    return again


def _layout(topology: Topology, ranks: Numbers, held: Numbers) -> Layout:
    physical = np.full(topology.shape, EMPTY, dtype=np.int32)
    physical[:, ranks, : held.shape[2]] = held
    return Layout(topology, physical)


def _unsupported(field: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"solver 'deepseek_eplb' does not know {what}", field=field, reason="unsupported")
