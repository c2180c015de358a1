"""From one layout to another in rounds: which weights are copied where, and what may happen at the same time.

In a round every rank sends at most one expert to another rank and receives at most one; every source is read before
any target is written or slot emptied. The layout after each round is a valid one, so that a crash between rounds leaves
every expert somewhere. Which slot of a rank an expert sits in does not matter: what stays on a rank stays in its slot.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from omni_common.errors import FailedPrecondition, InvalidRequest
from omni_placement.layout import EMPTY, Layout, Slots

_CHOICES = 8
_NAMED = 8  # experts named in an error
_Key = tuple[int, int]
_Hop = tuple[int, int, int, int]  # expert, source rank, target rank, expert overwritten there or EMPTY


@dataclass(frozen=True, slots=True)
class Move:
    """Weights of one expert of one layer, copied from slot to slot; within a rank nothing is sent."""

    layer: int
    expert: int
    source_rank: int
    source_slot: int
    target_rank: int
    target_slot: int


@dataclass(frozen=True, slots=True)
class Drop:
    """A slot that is empty after the round."""

    layer: int
    rank: int
    slot: int


@dataclass(frozen=True, slots=True)
class Round:
    """Moves into slots that are empty or may be overwritten, and slots that are emptied."""

    moves: tuple[Move, ...]
    drops: tuple[Drop, ...] = ()


def apply_rounds(layout: Layout, steps: Iterable[Round]) -> Layout:
    """The layout after all of them, in order; what lies between is not checked.

    Raises:
        InvalidRequest: a move's source does not hold its expert, or what is left is no layout.
    """
    physical = layout.physical.copy()
    for step in steps:
        moving = [int(physical[move.layer, move.source_rank, move.source_slot]) for move in step.moves]
        for move, expert in zip(step.moves, moving, strict=True):
            if expert != move.expert:
                message = f"{move} starts where the expert is not"
                raise InvalidRequest(message, field="rounds.moves", reason="invalid_round")
            physical[move.layer, move.target_rank, move.target_slot] = expert
        for drop in step.drops:
            physical[drop.layer, drop.rank, drop.slot] = EMPTY
    return Layout(layout.topology, physical)


def moved_experts(current: Layout, target: Layout) -> int:
    """Expert weights (of one layer each) that must reach a rank that does not hold them. Both of one topology."""
    return int(((target.indicator == 1) & (current.indicator == 0)).sum())


def moved_bytes(current: Layout, target: Layout) -> int:
    """Weight bytes sent between ranks; 0 where the topology does not say how large an expert is."""
    return moved_experts(current, target) * target.topology.expert_bytes


def fewest_rounds(current: Layout, target: Layout) -> int:
    """No schedule has fewer rounds: a rank receives one expert a round, and sends each expert that it alone holds at
    least once."""
    arriving = (target.indicator == 1) & (current.indicator == 0)
    is_alone = (current.indicator == 1) & (current.replicas == 1)
    forced = is_alone & arriving.any(axis=0)
    return int(max(arriving.sum(axis=(1, 2)).max(), forced.sum(axis=(1, 2)).max()))


def rounds(current: Layout, target: Layout, failed_ranks: frozenset[int] = frozenset()) -> tuple[Round, ...]:
    """Rounds from `current` to what `target` has on each rank; deterministic, none where nothing differs.

    Failed ranks send nothing and are emptied in the first round. Busy receivers are served first in every round;
    sources on the same host are preferred, then those with least left to send. There is always a way: an arrival that
    finds its rank full takes the slot of a departing expert that has a copy elsewhere, or sends a departing one that
    has none on to a rank that waits for it, in the same round. Such a chain of ranks ends at a slot or closes in a
    cycle. The number of rounds is not proven least; `fewest_rounds` says how far it can be from that.

    Raises:
        InvalidRequest: layouts of different topologies, or a target that uses a failed rank or more slots than
            there are.
        FailedPrecondition: experts that only failed ranks hold; the message names them.
    """
    if current.topology != target.topology:
        raise InvalidRequest("layouts of different topologies", field="topology", reason="other_topology")
    failed = sorted(rank for rank in failed_ranks if rank < target.topology.num_ranks)
    if failed and (used := (target.physical[:, failed] != EMPTY).any(axis=(0, 2))).any():
        rank = failed[int(np.argmax(used))]
        raise InvalidRequest(f"the target uses failed rank {rank}", field="excluded_ranks", reason="excluded_rank")
    physical = current.physical.copy()
    emptied = [Drop(layer, failed[i], slot) for layer, i, slot in _places(physical[:, failed] != EMPTY)]
    physical[:, failed] = EMPTY
    _check_nothing_is_lost(physical, failed, current)
    schedule = _Schedule(physical, target)
    planned = list(schedule.run())
    if not planned and not emptied and not schedule.leftover():
        return ()
    planned = planned or [Round(())]
    planned[0] = Round(planned[0].moves, (*emptied, *planned[0].drops))
    planned[-1] = Round(planned[-1].moves, (*planned[-1].drops, *schedule.leftover()))
    return tuple(planned)


def _check_nothing_is_lost(physical: Slots, failed: list[int], current: Layout) -> None:
    shape = current.topology
    held = np.zeros((shape.num_layers, shape.num_experts + 1), dtype=bool)
    held[np.arange(shape.num_layers)[:, None], physical.reshape(shape.num_layers, -1)] = True
    lost = [f"{expert} of layer {layer}" for layer, expert in _places(~held[:, :-1])]
    if lost:
        named = ", ".join(lost[:_NAMED]) + (f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else "")
        message = f"failed ranks {failed} held the only copy of expert {named}"
        raise FailedPrecondition(message, field="excluded_ranks", reason="lost_expert")


class _Schedule:
    """What is where while rounds are laid out. Keys are (layer, expert) or (layer, rank); dicts keep their order."""

    def __init__(self, physical: Slots, target: Layout) -> None:
        shape = target.topology
        self._hosts: list[int] = shape.hosts.tolist()
        self._holders: dict[_Key, dict[int, int]] = {}  # (layer, expert) -> rank -> slot, as the round begins
        self._copies: dict[_Key, int] = {}  # (layer, expert) -> copies after the round
        self._waiting: dict[_Key, dict[int, None]] = {}  # (layer, expert) -> ranks it must still reach
        self._pending: list[dict[_Key, None]] = [{} for _ in range(shape.num_ranks)]  # the same by rank
        self._free: dict[_Key, list[int]] = {}  # (layer, rank) -> empty slots
        self._leaving: dict[_Key, dict[int, int]] = {}  # (layer, rank) -> expert -> slot, held but not of the target
        self._sending: set[int] = set()
        self._receiving: set[int] = set()
        self._moves: list[Move] = []
        self._overwritten: list[tuple[_Key, int]] = []
        self._read(physical, target)
        # Sends that a rank must expect if every holder takes its share.
        self._duty = [0.0] * shape.num_ranks
        for key, ranks in self._waiting.items():
            for rank in self._holders[key]:
                self._duty[rank] += len(ranks) / len(self._holders[key])

    def _read(self, physical: Slots, target: Layout) -> None:
        shape = target.topology
        indicator = target.indicator
        usable = np.arange(shape.slots_per_rank) < shape.capacity[:, None]
        for layer, rank, slot in _places((physical == EMPTY) & usable):
            self._free.setdefault((layer, rank), []).append(slot)
        for layer, rank, slot in _places(physical != EMPTY):
            expert = int(physical[layer, rank, slot])
            self._holders.setdefault((layer, expert), {})[rank] = slot
            if not indicator[rank, layer, expert]:
                self._leaving.setdefault((layer, rank), {})[expert] = slot
        for rank, layer, expert in _places(indicator):
            if rank not in self._holders[layer, expert]:
                self._waiting.setdefault((layer, expert), {})[rank] = None
                self._pending[rank][layer, expert] = None
        self._copies = {key: len(ranks) for key, ranks in self._holders.items()}

    def run(self) -> Iterator[Round]:
        """Rounds until nothing is pending."""
        while busy := sorted((-len(keys), rank) for rank, keys in enumerate(self._pending) if keys):
            for _, rank in busy:
                if rank not in self._receiving:
                    self._serve(rank)
            if not self._moves:
                message = f"the target needs a slot on rank {busy[0][1]} that there is not"
                raise InvalidRequest(message, field="physical_to_logical", reason="invalid_layout")
            yield self._close()

    def leftover(self) -> tuple[Drop, ...]:
        """What is still held but not of the target, once nothing is pending."""
        return tuple(Drop(*key, slot) for key, leaving in self._leaving.items() for slot in leaving.values())

    def _serve(self, rank: int) -> None:
        """Let a rank receive the pending expert that is best fetched, where some way in is open."""
        choices = []
        for key in self._pending[rank]:
            if (source := self._source(key, rank)) is not None:
                choices.append((self._hosts[source] != self._hosts[rank], -self._duty[source], *key, source))
                if len(choices) == _CHOICES:
                    break
        for *_, layer, expert, source in sorted(choices):
            if chain := self._way_in(layer, expert, source, rank):
                self._commit(layer, chain)
                return

    def _source(self, key: _Key, rank: int) -> int | None:
        """The holder to copy from: on the same host, then with least left to send; None where all are sending."""
        able = [r for r in self._holders[key] if r not in self._sending]
        if len(able) < 2:
            return able[0] if able else None
        host = self._hosts[rank]
        return min(able, key=lambda r: (self._hosts[r] != host, self._duty[r], r))

    def _way_in(self, layer: int, expert: int, source: int, rank: int) -> list[_Hop]:
        """Hops of this round that end with a slot for each arrival; the first brings `expert` from `source` to `rank`.

        Searched breadth first over the layer's ranks. Empty where there is no way.
        """
        came = {rank: (source, expert)}
        queue = deque([rank])
        while queue:
            here = queue.popleft()
            leaving = self._leaving.get((layer, here), {})
            if self._free.get((layer, here)):
                return _chain(came, rank, here, EMPTY)
            spare = [d for d in leaving if self._copies[layer, d] + (d == expert) > 1]
            if spare:
                dropped = min(spare, key=lambda d: len(self._waiting.get((layer, d), ())))
                return _chain(came, rank, here, dropped)
            if here in self._sending or here == source:
                continue
            for departing in leaving:
                for there in self._waiting.get((layer, departing), ()):
                    if there not in self._receiving and there not in came:
                        came[there] = (here, departing)
                        queue.append(there)
        return []

    def _commit(self, layer: int, chain: list[_Hop]) -> None:
        for expert, source, target, dropped in chain:
            key, place = (layer, expert), (layer, target)
            slot = self._free[place].pop(0) if dropped == EMPTY else self._leaving[place].pop(dropped)
            self._moves.append(Move(layer, expert, source, self._holders[key][source], target, slot))
            self._sending.add(source)
            self._receiving.add(target)
            self._duty[source] -= 1
            self._copies[key] += 1
            if dropped != EMPTY:
                self._copies[layer, dropped] -= 1
                self._overwritten.append(((layer, dropped), target))
            del self._waiting[key][target], self._pending[target][key]

    def _close(self) -> Round:
        done = Round(tuple(self._moves))
        for key, rank in self._overwritten:
            del self._holders[key][rank]
        for move in self._moves:
            self._holders[move.layer, move.expert][move.target_rank] = move.target_slot
        self._moves, self._overwritten = [], []
        self._sending.clear()
        self._receiving.clear()
        return done


def _chain(came: dict[int, tuple[int, int]], start: int, end: int, dropped: int) -> list[_Hop]:
    """The hops from `start` on to `end`, the last one first: each fills the slot that the one listed before leaves."""
    chain: list[_Hop] = []
    while True:
        source, expert = came[end]
        chain.append((expert, source, end, dropped))
        if end == start:
            return chain
        end, dropped = source, expert


def _places(mask: npt.NDArray[np.generic]) -> list[tuple[int, ...]]:
    """Where an array is not zero, as tuples in row-major order."""
    return [tuple(place) for place in np.argwhere(mask).tolist()]
