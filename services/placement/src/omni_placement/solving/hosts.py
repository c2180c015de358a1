"""Expert groups kept together on hosts.

With group-limited routing a token goes to the experts of few groups, so fewer tokens cross hosts where a group has one.
"""

import numpy as np

from omni_common.compiled import kernel
from omni_placement.layout import EMPTY, Numbers, Slots, Topology
from omni_placement.problem import Loads
from omni_placement.solving.layer import Layer
from omni_placement.solving.replicas import LayerPlan
from omni_placement.solving.slack import bring_home

LOOSENESS = 1.1, 1.02, 1.0
"""How far above a plan's slowest rank groups are brought together at first; less where the search cannot make up."""
COST = 5e-4
"""How much higher than the plan's slowest rank one may be, relative to it, with groups together."""
STEPS = 200
"""Of the search, to make up for it."""


def gathered(topology: Topology, layer: Layer, plan: LayerPlan) -> LayerPlan:
    """The plan with expert groups together on hosts, as far as the slowest rank stays within `COST` of where it is:
    brought together at the cost of balance first, then improved with little of it undone."""
    hosts = np.unique(topology.hosts[layer.capacity > 0])
    homes = hosts[_home_hosts(layer.load.reshape(topology.num_groups, -1).sum(axis=1), len(hosts))]
    is_away = topology.hosts[:, None] != np.repeat(homes, topology.num_experts // topology.num_groups)
    target = (1 + COST) * plan.height
    for looseness in LOOSENESS:
        held = plan.held.copy()
        bring_home(held, layer.load, layer.capacity, layer.pinned, is_away * layer.load, looseness * plan.height)
        gathered = layer.improved_near(_closed_up(held), plan.extra, is_away, target, STEPS)
        if gathered.height <= target:
            return gathered
    return plan


def _closed_up(held: Slots) -> Slots:
    """The same with experts in the first slots of each rank."""
    return np.take_along_axis(held, np.argsort(held == EMPTY, axis=1, kind="stable"), axis=1)


@kernel
def _home_hosts(group_load: Loads, num_hosts: int) -> Numbers:
    """The host of each group, (groups,): heaviest first, to the least loaded host; groups as even as they divide."""
    homes = np.zeros(len(group_load), dtype=np.int64)
    host_load, held = np.zeros(num_hosts), np.zeros(num_hosts, dtype=np.int64)
    most = -(-len(group_load) // num_hosts)
    for group in np.argsort(-group_load, kind="mergesort"):
        best = -1
        for host in range(num_hosts):
            if held[host] < most and (best < 0 or host_load[host] < host_load[best]):
                best = host
        homes[group] = best
        host_load[best] += group_load[group]
        held[best] += 1
    return homes
