"""When two topologies are of the same ranks, and what one adds to the other."""

from dataclasses import replace

from omni_placement.layout import Layout, Topology

DETAILS = ("ranks_per_host", "rank_slots", "shared_ranks", "num_groups", "expert_bytes")


def outline(topology: Topology) -> str:
    """The numbers that must agree, in words."""
    layers, ranks, slots = topology.shape
    return f"{layers} layers of {topology.num_experts} experts on {ranks} ranks of {slots} slots"


def same_outline(one: Topology, two: Topology) -> bool:
    return one.shape == two.shape and one.num_experts == two.num_experts


def filled(mine: Topology, told: Topology) -> Topology:
    """`mine`, with details it leaves at their defaults taken from `told`."""
    bare = Topology(mine.num_layers, mine.num_experts, mine.num_ranks, mine.slots_per_rank)
    return replace(mine, **{n: getattr(told, n) for n in DETAILS if getattr(mine, n) == getattr(bare, n)})


def under(topology: Topology, layout: Layout) -> Layout | None:
    """The layout as one of `topology`; None where the outlines differ."""
    return Layout(topology, layout.physical) if same_outline(topology, layout.topology) else None
