"""Expert layouts as arrays: where experts lie, what a round changes, and which copies a rank routes to. Pure numpy.

A layout is int32 (layers, ranks, slots): the logical expert in each physical slot, -1 for an empty one. vLLM numbers
the physical experts of a layer rank by rank: rank * slots + slot.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from omni_common.errors import InvalidRequest
from omni_engine.ports import ExpertMove

EMPTY = -1
Physical = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


def initial_layout(layers: int, experts: int, ranks: int, slots: int) -> Physical:
    """Where vLLM loads experts: every expert in order, then the first ones again in the spare slots."""
    row = np.arange(ranks * slots, dtype=np.int32) % experts
    return np.broadcast_to(row.reshape(ranks, slots), (layers, ranks, slots)).copy()


def routing_tables(
    physical: Physical, num_experts: int, near: Bools, same_host: Bools, usable: Bools
) -> tuple[Counts, Counts]:
    """The copies one rank chooses from: those near if there are any, else those on its host, else all.

    `near`, `same_host` and `usable` are (ranks,). Near are the ranks that route the same tokens: itself under data
    parallelism, its whole group under tensor parallelism, where all must choose alike.

    Returns physical ids (layers, experts, ranks), -1 behind the last choice, and the number of choices
    (layers, experts), 0 where an expert lives on no usable rank.
    """
    layers, ranks, slots = physical.shape
    layer, rank, slot = np.nonzero((physical != EMPTY) & usable[None, :, None])
    key = layer * num_experts + physical[layer, rank, slot]
    distance = np.where(near, 0, np.where(same_host, 1, 2))[rank]
    closest = np.full(layers * num_experts, 3)
    np.minimum.at(closest, key, distance)
    is_choice = distance == closest[key]
    order = np.argsort(key[is_choice], kind="stable")
    chosen_key = key[is_choice][order]
    counts = np.bincount(chosen_key, minlength=layers * num_experts)
    position = np.arange(len(chosen_key)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((layers * num_experts, ranks), EMPTY, dtype=np.int64)
    table[chosen_key, position] = (rank * slots + slot)[is_choice][order]
    return table.reshape(layers, num_experts, ranks), counts.reshape(layers, num_experts)


def check_round(current: Physical, moves: Sequence[ExpertMove], target: Physical, num_experts: int) -> None:
    """That the moves, all read before any is written, turn `current` into `target`.

    Raises:
        InvalidRequest: naming the first thing that does not fit.
    """
    if target.shape != current.shape:
        raise InvalidRequest(f"layout of shape {target.shape}; the engine's is {current.shape}", field="layout")
    reached = current.copy()
    written: set[tuple[int, int, int]] = set()
    for move in moves:
        _check_move(current, move)
        place = (move.layer, move.target_rank, move.target_slot)
        if place in written:
            raise InvalidRequest(f"two moves write {_slot(*place)}", field="moves")
        written.add(place)
        reached[place] = move.expert
    wrong = np.argwhere((target != EMPTY) & (target != reached))
    if len(wrong):
        layer, rank, slot = map(int, wrong[0])
        raise InvalidRequest(
            f"expert {target[layer, rank, slot]} is to lie in {_slot(layer, rank, slot)}, "
            f"which holds {reached[layer, rank, slot]} after the moves",
            field="layout",
        )
    _check_layout(target, num_experts)


def homeless(physical: Physical, num_experts: int, usable: Bools) -> list[tuple[int, int]]:
    """(layer, expert) that live on no usable rank."""
    everyone = np.ones(physical.shape[1], dtype=np.bool_)
    _, counts = routing_tables(physical, num_experts, everyone, everyone, usable)
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(counts == 0)]


def ranks_mask(ranks: int, chosen: Iterable[int]) -> Bools:
    mask = np.zeros(ranks, dtype=np.bool_)
    mask[list(chosen)] = True
    return mask


def logical_counts(per_slot: Counts, physical: Physical, num_experts: int) -> Counts:
    """Counts (layers, ranks * slots) of physical experts as (layers, experts) of logical ones."""
    layers = len(physical)
    flat = physical.reshape(layers, -1)
    layer, slot = np.nonzero(flat != EMPTY)
    key = layer * num_experts + flat[layer, slot]
    summed = np.bincount(key, weights=per_slot[layer, slot], minlength=layers * num_experts)
    return summed.astype(np.int64).reshape(layers, num_experts)


def _check_move(current: Physical, move: ExpertMove) -> None:
    layers, ranks, slots = current.shape
    for name, value, limit in (
        ("layer", move.layer, layers),
        ("source_rank", move.source_rank, ranks),
        ("source_slot", move.source_slot, slots),
        ("target_rank", move.target_rank, ranks),
        ("target_slot", move.target_slot, slots),
    ):
        if not 0 <= value < limit:
            raise InvalidRequest(f"{name} {value} of a move; there are {limit}", field=f"moves.{name}")
    held = int(current[move.layer, move.source_rank, move.source_slot])
    if held != move.expert:
        place = _slot(move.layer, move.source_rank, move.source_slot)
        raise InvalidRequest(f"expert {move.expert} is to come from {place}, which holds {held}", field="moves")


def _check_layout(physical: Physical, num_experts: int) -> None:
    if physical.min() < EMPTY or physical.max() >= num_experts:
        raise InvalidRequest(f"experts are numbered from 0 to {num_experts - 1}", field="layout")
    ordered = np.sort(physical, axis=2)
    twice = np.argwhere((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] != EMPTY))
    if len(twice):
        layer, rank, _ = map(int, twice[0])
        raise InvalidRequest(f"an expert lies twice on rank {rank} of layer {layer}", field="layout")
    if lost := homeless(physical, num_experts, np.ones(physical.shape[1], dtype=np.bool_)):
        layer, expert = lost[0]
        raise InvalidRequest(f"expert {expert} of layer {layer} lies on no rank", field="layout")


def _slot(layer: int, rank: int, slot: int) -> str:
    return f"slot {slot} of rank {rank} in layer {layer}"
