"""Layouts: which logical expert sits in which slot of which rank, per layer. Values only.

    physical[layer, rank, slot] = logical expert, or EMPTY

A layout that exists is a valid one: every expert at least once per layer, at most once per rank.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from omni_common.errors import InvalidRequest

EMPTY = -1
MAX_SLOTS = 16_777_216
# Bytes of all slots together stay within 64 bits.
MAX_EXPERT_BYTES = 2**36
Slots = npt.NDArray[np.int32]
Load = npt.NDArray[np.int64]
AnyLoad = Load | npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
Array = TypeVar("Array", bound=npt.NDArray[Any])
Tokens = TypeVar("Tokens", bound=AnyLoad)


@dataclass(frozen=True)
class Topology:
    """Shape of one model instance's expert parallelism.

    `slots_per_rank` is per layer, the width of a layout. `rank_slots` caps what each rank may use of it (uneven
    memory). `shared_ranks` only hold the shared expert: no routed expert is placed there. `ranks_per_host` 0 means one
    host; `num_groups` are the expert groups of group-limited routing; `expert_bytes` are the weights of one expert of
    one layer, 0 where unknown.

    Raises:
        InvalidRequest: the parts contradict each other, or the experts do not fit; the field is named.
    """

    num_layers: int
    num_experts: int
    num_ranks: int
    slots_per_rank: int
    ranks_per_host: int = 0
    rank_slots: tuple[int, ...] = ()
    shared_ranks: tuple[int, ...] = ()
    num_groups: int = 1
    expert_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_experts", "num_ranks", "slots_per_rank", "num_groups"):
            if getattr(self, name) < 1:
                raise _infeasible(name, "must be at least 1")
        for name in ("ranks_per_host", "expert_bytes"):
            if getattr(self, name) < 0:
                raise _infeasible(name, "must not be negative")
        if self.expert_bytes > MAX_EXPERT_BYTES:
            raise _infeasible("expert_bytes", f"must be at most {MAX_EXPERT_BYTES}")
        if (slots := self.num_layers * self.num_ranks * self.slots_per_rank) > MAX_SLOTS:
            raise _infeasible("", f"has {slots} slots in all; at most {MAX_SLOTS}")
        if self.num_experts % self.num_groups:
            raise _infeasible("num_groups", f"does not divide {self.num_experts} experts")
        object.__setattr__(self, "rank_slots", tuple(self.rank_slots))
        object.__setattr__(self, "shared_ranks", tuple(sorted(set(self.shared_ranks))))
        if self.rank_slots and len(self.rank_slots) != self.num_ranks:
            raise _infeasible("rank_slots", f"has {len(self.rank_slots)} entries for {self.num_ranks} ranks")
        if any(not 0 <= slots <= self.slots_per_rank for slots in self.rank_slots):
            raise _infeasible("rank_slots", f"must lie between 0 and {self.slots_per_rank}")
        if any(not 0 <= rank < self.num_ranks for rank in self.shared_ranks):
            raise _infeasible("shared_ranks", f"names ranks beyond 0 to {self.num_ranks - 1}")
        if (slots := int(self.capacity.sum())) < self.num_experts:
            message = f"leaves {slots} slots on {self.num_ranks} ranks, which cannot hold {self.num_experts} experts"
            raise _infeasible("slots_per_rank", message)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.num_layers, self.num_ranks, self.slots_per_rank

    @cached_property
    def hosts(self) -> Numbers:
        """Host of each rank, (ranks,)."""
        ranks = np.arange(self.num_ranks, dtype=np.int64)
        return _frozen(ranks // self.ranks_per_host if self.ranks_per_host else np.zeros_like(ranks))

    @cached_property
    def capacity(self) -> Numbers:
        """Slots of a layer that routed experts may use on each rank, (ranks,)."""
        slots = np.array(self.rank_slots or (self.slots_per_rank,) * self.num_ranks, dtype=np.int64)
        slots[list(self.shared_ranks)] = 0
        return _frozen(slots)


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
        in_order = np.sort(self.physical, axis=2)
        if (repeated := (in_order[:, :, 1:] == in_order[:, :, :-1]) & (in_order[:, :, 1:] != EMPTY)).any():
            layer, rank, slot = np.argwhere(repeated)[0]
            raise _invalid(f"expert {in_order[layer, rank, slot]} of layer {layer} is on rank {rank} more than once")
        if (missing := _copies(self.topology, self.physical) == 0).any():
            layer, expert = np.argwhere(missing)[0]
            raise _invalid(f"expert {expert} of layer {layer} is on no rank")
        object.__setattr__(self, "physical", _frozen(np.array(self.physical, dtype=np.int32, order="C")))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout):
            return NotImplemented
        return self.topology == other.topology and np.array_equal(self.physical, other.physical)

    def __hash__(self) -> int:
        return hash((self.topology, self.physical.tobytes()))

    @cached_property
    def indicator(self) -> Slots:
        """int32 0/1 array (ranks, layers, experts): 1 where a rank holds an expert."""
        topology = self.topology
        indicator = np.zeros((topology.num_ranks, topology.num_layers, topology.num_experts), dtype=np.int32)
        layers, ranks, slots = np.nonzero(self.physical != EMPTY)
        indicator[ranks, layers, self.physical[layers, ranks, slots]] = 1
        return _frozen(indicator)

    @cached_property
    def replicas(self) -> Slots:
        """Copies of each expert: int32 (layers, experts)."""
        return _frozen(_copies(self.topology, self.physical))

    def rank_loads(self, load: AnyLoad) -> npt.NDArray[np.float64]:
        """Tokens each rank computes, (layers, ranks), where an expert's tokens spread evenly over its copies."""
        share = checked_load(self.topology, load) / self.replicas
        held = np.take_along_axis(share, np.maximum(self.physical, 0).reshape(len(share), -1), axis=1)
        loads: npt.NDArray[np.float64] = held.reshape(self.topology.shape).sum(axis=2, where=self.physical != EMPTY)
        return loads

    def step_load(self, load: AnyLoad) -> float:
        """Tokens that the slowest rank of each layer computes, summed over layers: what a step has to wait for."""
        return float(self.rank_loads(load).max(axis=1).sum())

    def balancedness(self, load: AnyLoad, excluded_ranks: frozenset[int] = frozenset()) -> npt.NDArray[np.float64]:
        """Mean over the slowest rank's load, per layer, in (0, 1]; 1 where a layer has no load.

        Ranks that can hold nothing do not count: those of the shared expert, those without slots, `excluded_ranks`.
        """
        usable = self.topology.capacity > 0
        usable[list(excluded_ranks)] = False
        loads = self.rank_loads(load)[:, usable]
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


def checked_load(topology: Topology, load: Tokens) -> Tokens:
    """The load, if it is of the topology's shape and not negative."""
    if load.shape != (topology.num_layers, topology.num_experts):
        expected = (topology.num_layers, topology.num_experts)
        raise InvalidRequest(f"load of shape {load.shape} does not fit {expected}", field="load")
    if not np.isfinite(load).all() or (load < 0).any():
        raise InvalidRequest("token counts are finite and not negative", field="load.tokens")
    return load


def checked_capacity(layout: Layout) -> Layout:
    """The layout, if it uses no slot beyond a rank's capacity. One that engines hold may: they have slots that a
    topology says shall be left empty.

    Raises:
        InvalidRequest: it does; the message names the first place.
    """
    beyond = np.arange(layout.topology.slots_per_rank) >= layout.topology.capacity[:, None]
    if (unusable := (layout.physical != EMPTY) & beyond).any():
        layer, rank, slot = np.argwhere(unusable)[0]
        slots = layout.topology.capacity[rank]
        raise _invalid(f"slot {slot} of rank {rank} is used in layer {layer}; that rank has {slots} for routed experts")
    return layout


def _frozen(array: Array) -> Array:
    array.setflags(write=False)
    return array


def _copies(topology: Topology, physical: Slots) -> Slots:
    """Copies of each expert, (layers, experts)."""
    experts = topology.num_experts + 1  # EMPTY is counted as one more expert
    numbered = physical + 1 + experts * np.arange(topology.num_layers)[:, None, None]
    counts = np.bincount(numbered.ravel(), minlength=topology.num_layers * experts)
    return counts.reshape(topology.num_layers, experts)[:, 1:].astype(np.int32)


def _infeasible(name: str, message: str) -> InvalidRequest:
    field = f"topology.{name}" if name else "topology"
    return InvalidRequest(f"{field} {message}", field=field, reason="infeasible_topology")


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(f"no layout: {message}", field="physical_to_logical", reason="invalid_layout")
