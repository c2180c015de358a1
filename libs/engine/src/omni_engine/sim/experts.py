"""Expert parallelism of the simulated engine: what each rank computes under the layout in force, and its change."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from omni_common.errors import InvalidRequest, Unavailable
from omni_engine.ports import ExpertLayout, ExpertLoad, ExpertMove, RanksFailed
from omni_engine.sim.clock import Clock
from omni_engine.sim.router import Counts, Router
from omni_engine.sim.settings import Faults, SimSettings

Slots = npt.NDArray[np.int32]
EMPTY = -1


class SlotMap:
    """A layout as the router needs it: the tokens of an expert go in turn to its copies on the ranks in use."""

    def __init__(self, physical: Slots, dropped: frozenset[int], num_experts: int) -> None:
        """Raises InvalidRequest naming the experts that no rank in use holds."""
        usable = physical != EMPTY
        usable[:, sorted(dropped)] = False
        num_layers = len(physical)
        self._shape = physical.shape
        self._layers, ranks, slots = np.nonzero(usable)
        self._experts = physical[self._layers, ranks, slots]
        self._place = np.ravel_multi_index((self._layers, ranks), self._shape[:2])
        copies = np.zeros((num_layers, num_experts), dtype=np.int64)
        np.add.at(copies, (self._layers, self._experts), 1)
        if (lost := np.argwhere(copies == 0)).size:
            named = ", ".join(f"layer {layer} expert {expert}" for layer, expert in lost[:8])
            raise InvalidRequest(f"{len(lost)} experts live on no rank in use: {named}", field="ranks")
        self._copies = copies[self._layers, self._experts]
        self._ordinal = _ordinals(self._layers * num_experts + self._experts)

    def rank_tokens(self, counts: Counts, turn: int) -> Counts:
        """(layers, ranks) of counts (layers, experts); the copy that gets a remainder changes with `turn`."""
        behind = (self._ordinal + turn) % self._copies
        tokens = (counts[self._layers, self._experts] + self._copies - 1 - behind) // self._copies
        num_layers, num_ranks, _ = self._shape
        sums = np.bincount(self._place, weights=tokens, minlength=num_layers * num_ranks)
        return sums.astype(np.int64).reshape(num_layers, num_ranks)


def _ordinals(keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many equal keys stand before each one."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.searchsorted(ordered, ordered)
    ordinals = np.empty(len(keys), dtype=np.int64)
    ordinals[order] = np.arange(len(keys)) - starts
    return ordinals


@dataclass(frozen=True, slots=True)
class Routed:
    """One step: tokens per expert (layers, experts) and rank (layers, ranks), and how much longer it lasts for them."""

    tokens: Counts
    rank_tokens: Counts
    num_tokens: int
    factor: float


class SimExperts:
    """The ranks of one engine; layout 0 is the experts in order, the spare slots holding the first ones again."""

    def __init__(self, settings: SimSettings, faults: Faults, clock: Clock, wake: Callable[[], object]) -> None:
        """`wake` is called when the engine should reach a step boundary although nothing runs."""
        self._settings, self._faults, self._clock, self._wake = settings, faults, clock, wake
        self._router = Router(settings)
        self.class_of = self._router.class_of
        num_ranks, slots = settings.experts.num_ranks, settings.expert_slots_per_rank
        in_order = np.arange(num_ranks * slots, dtype=np.int32) % settings.num_experts
        physical = np.broadcast_to(in_order.reshape(num_ranks, slots), (settings.num_moe_layers, num_ranks, slots))
        self.layout = ExpertLayout(0, physical)
        self._dropped: frozenset[int] = frozenset()
        self._map = SlotMap(physical, self._dropped, settings.num_experts)
        self._moving = asyncio.Lock()
        self._switch: tuple[ExpertLayout, asyncio.Future[None]] | None = None
        self._ended = ""
        self._tokens: Counts
        self._rank_tokens: Counts
        self._reset()

    def route(self, chunks: Iterable[tuple[int, int]]) -> Routed:
        """The step that computes these (traffic class, tokens); see the package's docstring for the factor."""
        by_class: Counter[int] = Counter()
        for traffic_class, count in chunks:
            by_class[traffic_class] += count
        tokens = self._router.route(by_class)
        rank_tokens = self._map.rank_tokens(tokens, self._steps)
        even, share = rank_tokens.mean(axis=1).sum(), self._settings.experts.moe_share
        slowest = float(rank_tokens.max(axis=1).sum() / even) if even else 1.0
        return Routed(tokens, rank_tokens, by_class.total(), 1 - share + share * slowest)

    def done(self, routed: Routed, duration_ms: float) -> None:
        """The step has been computed."""
        self._tokens += routed.tokens
        self._rank_tokens += routed.rank_tokens
        self._routed_tokens += routed.num_tokens
        self._duration_ms += duration_ms
        self._steps += 1

    def take(self) -> ExpertLoad:
        """The load since the last call."""
        load = ExpertLoad(
            self._tokens,
            self._rank_tokens,
            self.layout.version,
            self._steps,
            self._duration_ms,
            self._routed_tokens,
        )
        self._reset()
        return load

    async def move(self, moves: Sequence[ExpertMove], layout: ExpertLayout) -> None:
        """Copy while steps go on, then wait for `at_boundary`."""
        async with self._moving:
            self._check_round(moves, layout)
            await self._clock.sleep(self._copy_s(moves))
            self._fail_on_purpose(moves)
            if self._ended:
                raise Unavailable(self._ended, reason="engine_dead")
            switched: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._switch = (layout, switched)
            self._wake()
            try:
                await switched
            finally:
                self._switch = None

    def drop(self, ranks: Sequence[int]) -> None:
        dropped = frozenset(ranks)
        if not dropped <= set(range(self._settings.experts.num_ranks)):
            raise InvalidRequest(f"there are {self._settings.experts.num_ranks} ranks", field="ranks")
        self._map = SlotMap(self.layout.physical, dropped, self._settings.num_experts)
        self._dropped = dropped

    async def at_boundary(self) -> None:
        """Between two steps: put a layout in force whose experts have arrived."""
        if self._switch is None:
            return
        layout, switched = self._switch
        await self._clock.sleep(self._settings.experts.switch_ms / 1e3)
        if switched.done():
            return
        try:
            self._map = SlotMap(layout.physical, self._dropped, self._settings.num_experts)
        except InvalidRequest as error:  # ranks were dropped while the experts were copied
            switched.set_exception(error)
            return
        self.layout = layout
        self._rank_tokens = np.zeros_like(self._rank_tokens)
        switched.set_result(None)

    def end(self, reason: str) -> None:
        """The engine takes no further step: a round under way fails."""
        self._ended = reason
        if self._switch is not None and not self._switch[1].done():
            self._switch[1].set_exception(Unavailable(reason, reason="engine_dead"))

    def _reset(self) -> None:
        settings = self._settings
        self._tokens = np.zeros((settings.num_moe_layers, settings.num_experts), dtype=np.int64)
        self._rank_tokens = np.zeros((settings.num_moe_layers, settings.experts.num_ranks), dtype=np.int64)
        self._steps, self._duration_ms, self._routed_tokens = 0, 0.0, 0

    def _check_round(self, moves: Sequence[ExpertMove], layout: ExpertLayout) -> None:
        held, wanted = self.layout.physical, layout.physical
        if wanted.shape != held.shape or ((wanted < EMPTY) | (wanted >= self._settings.num_experts)).any():
            raise InvalidRequest(f"a layout of this engine has the shape {held.shape}", field="layout")
        arrived = held.copy()
        for move in moves:
            _check_places(move, held.shape)
            if held[move.layer, move.source_rank, move.source_slot] != move.expert:
                raise InvalidRequest(f"the source of {move} holds another expert", field="moves")
            arrived[move.layer, move.target_rank, move.target_slot] = move.expert
        if ((wanted != arrived) & (wanted != EMPTY)).any():
            raise InvalidRequest("the layout holds experts that no move brings", field="moves")
        SlotMap(wanted, self._dropped, self._settings.num_experts)

    def _copy_s(self, moves: Sequence[ExpertMove]) -> float:
        """The busiest direction of the busiest rank; copies inside a rank take no time."""
        sent = Counter(move.source_rank for move in moves if move.source_rank != move.target_rank)
        received = Counter(move.target_rank for move in moves if move.source_rank != move.target_rank)
        busiest = max([*sent.values(), *received.values()], default=0)
        experts = self._settings.experts
        return busiest * experts.expert_bytes / (experts.copy_gib_per_s * 2**30)

    def _fail_on_purpose(self, moves: Sequence[ExpertMove]) -> None:
        """A failed rank cannot take part in a copy, nor in a switch while it is in use."""
        touched = {rank for move in moves for rank in (move.source_rank, move.target_rank)}
        in_use = set(range(self._settings.experts.num_ranks)) - self._dropped
        if failed := sorted(set(self._faults.failed_ranks) & (touched | in_use)):
            raise RanksFailed(f"ranks {failed} do not answer", failed)
        if moves and self._faults.fail_next_moves:
            self._faults.fail_next_moves -= 1
            raise Unavailable("the round failed on purpose", reason="fault")


def _check_places(move: ExpertMove, shape: Sequence[int]) -> None:
    places = [(move.layer, move.source_rank, move.source_slot), (move.layer, move.target_rank, move.target_slot)]
    if not all(0 <= index < bound for place in places for index, bound in zip(place, shape, strict=True)):
        raise InvalidRequest(f"{move} names a slot that is not there", field="moves")
