"""Layouts: which logical expert sits in which slot of which rank, per layer. Values only.

    physical[layer, rank, slot] = logical expert, or EMPTY

A layout that exists is a valid one: every expert at least once per layer, at most once per rank.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from omni_common.errors import InvalidRequest

EMPTY = -1
MAX_SLOTS = 16_777_216
Slots = npt.NDArray[np.int32]
Load = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Topology:
    """Shape of one model instance's expert parallelism; `slots_per_rank` is per layer."""

    num_layers: int
    num_experts: int
    num_ranks: int
    slots_per_rank: int

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_experts", "num_ranks", "slots_per_rank"):
            if getattr(self, name) < 1:
                raise InvalidRequest(
                    f"{name} must be at least 1", field=f"topology.{name}", reason="infeasible_topology"
                )
        if self.num_ranks * self.slots_per_rank < self.num_experts:
            raise InvalidRequest(
                f"{self.num_ranks} ranks of {self.slots_per_rank} slots cannot hold {self.num_experts} experts",
                field="topology.slots_per_rank",
                reason="infeasible_topology",
            )
        if (slots := self.num_layers * self.num_ranks * self.slots_per_rank) > MAX_SLOTS:
            message = f"{slots} slots in all; at most {MAX_SLOTS}"
            raise InvalidRequest(message, field="topology", reason="infeasible_topology")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.num_layers, self.num_ranks, self.slots_per_rank


@dataclass(frozen=True, eq=False)
class Layout:
    """One assignment; the array is made read-only.

    Raises:
        InvalidRequest: the array breaks one of the invariants; the message names the first place.
    """

    topology: Topology
    physical: Slots

    def __post_init__(self) -> None:
        if self.physical.shape != self.topology.shape:
            raise _invalid(f"shape {self.physical.shape} is not {self.topology.shape}")
        if ((self.physical < EMPTY) | (self.physical >= self.topology.num_experts)).any():
            raise _invalid(f"experts are numbered 0 to {self.topology.num_experts - 1}, {EMPTY} is an empty slot")
        counts = _counts(self.topology, self.physical)
        if (counts > 1).any():
            rank, layer, expert = np.argwhere(counts > 1)[0]
            raise _invalid(f"expert {expert} of layer {layer} is on rank {rank} more than once")
        if (missing := counts.sum(axis=0) == 0).any():
            layer, expert = np.argwhere(missing)[0]
            raise _invalid(f"expert {expert} of layer {layer} is on no rank")
        frozen = np.ascontiguousarray(self.physical, dtype=np.int32).copy()
        frozen.setflags(write=False)
        object.__setattr__(self, "physical", frozen)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout):
            return NotImplemented
        return self.topology == other.topology and np.array_equal(self.physical, other.physical)

    def __hash__(self) -> int:
        return hash((self.topology, self.physical.tobytes()))

    @cached_property
    def indicator(self) -> Slots:
        """int32 0/1 array (ranks, layers, experts): 1 where a rank holds an expert."""
        indicator = _counts(self.topology, self.physical)
        indicator.setflags(write=False)
        return indicator

    @property
    def replicas(self) -> Slots:
        """Copies of each expert: (layers, experts)."""
        counts: Slots = self.indicator.sum(axis=0, dtype=np.int32)
        return counts

    def rank_loads(self, load: Load) -> npt.NDArray[np.float64]:
        """Tokens each rank computes, (layers, ranks), where an expert's tokens spread evenly over its copies."""
        share = checked_load(self.topology, load) / self.replicas
        loads: npt.NDArray[np.float64] = np.einsum("le,rle->lr", share, self.indicator.astype(np.float64))
        return loads

    def balancedness(self, load: Load) -> npt.NDArray[np.float64]:
        """Mean over the slowest rank's load, per layer, in (0, 1]; 1 where a layer has no load."""
        loads = self.rank_loads(load)
        slowest = loads.max(axis=1)
        ratio = loads.mean(axis=1) / np.where(slowest > 0, slowest, 1.0)
        return np.where(slowest > 0, np.minimum(ratio, 1.0), 1.0)


def from_indicator(indicator: npt.NDArray[np.int32], slots_per_rank: int | None = None) -> Layout:
    """The layout with the experts of a 0/1 array (ranks, layers, experts), in order of their numbers.

    Without `slots_per_rank` the fullest rank decides. Raises `InvalidRequest` for any other array.
    """
    if indicator.ndim != 3 or not np.isin(indicator, (0, 1)).all():
        raise _invalid("an indicator is a 0/1 array of (ranks, layers, experts)")
    held = indicator.sum(axis=2)
    slots = int(held.max(initial=0)) if slots_per_rank is None else slots_per_rank
    num_ranks, num_layers, num_experts = indicator.shape
    topology = Topology(num_layers, num_experts, num_ranks, slots)
    if (held > slots).any():
        rank, layer = np.argwhere(held > slots)[0]
        raise _invalid(f"rank {rank} holds {held[rank, layer]} experts of layer {layer} in {slots} slots")
    physical = np.full(topology.shape, EMPTY, dtype=np.int32)
    ranks, layers, experts = np.nonzero(indicator)
    position = np.cumsum(indicator, axis=2)[ranks, layers, experts] - 1
    physical[layers, ranks, position] = experts
    return Layout(topology, physical)


def checked_load(topology: Topology, load: Load) -> Load:
    """The load, if it is of the topology's shape and not negative."""
    if load.shape != (topology.num_layers, topology.num_experts):
        expected = (topology.num_layers, topology.num_experts)
        raise InvalidRequest(f"load of shape {load.shape} does not fit {expected}", field="load")
    if (load < 0).any():
        raise InvalidRequest("token counts are not negative", field="load.tokens")
    return load


def _counts(topology: Topology, physical: Slots) -> Slots:
    counts = np.zeros((topology.num_ranks, topology.num_layers, topology.num_experts), dtype=np.int32)
    layers, ranks, slots = np.nonzero(physical != EMPTY)
    np.add.at(counts, (ranks, layers, physical[layers, ranks, slots]), 1)
    return counts


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(f"no layout: {message}", field="physical_to_logical", reason="invalid_layout")
