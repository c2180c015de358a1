"""Movable experts of a running engine, seen from the service's process: load read, layouts applied, ranks dropped."""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np

from omni_common.errors import InvalidRequest, Unavailable
from omni_engine.ports import ExpertLayout, ExpertLoad, ExpertMove, RanksFailed
from omni_engine.vllm_expert_maps import check_round, homeless, ranks_mask

log = logging.getLogger(__name__)

# Data-parallel ranks compare what they have armed once in so many steps.
AGREE_EVERY_STEPS = 8
# Requests of this name are submitted to make an idle engine step; they do not count as load.
NUDGE = "omni-nudge"
_CALL_TIMEOUT_S = 30.0
_ROUND_TIMEOUT_S = 60.0
_POLL_S = 0.005


class Experts:
    """The expert-parallel group of one engine.

    `nudge` makes an idle engine take a few steps; data-parallel ranks apply rounds between steps only. `dead` is done
    once the engine is.
    """

    def __init__(
        self,
        engine_core: Any,
        num_experts: int,
        *,
        data_parallel: bool,
        nudge: Callable[[], Awaitable[None]],
        dead: asyncio.Future[str],
    ) -> None:
        self._core = engine_core
        self._num_experts = num_experts
        self._data_parallel = data_parallel
        self._nudge = nudge
        self._dead = dead
        self._dropped: tuple[int, ...] = ()
        self._is_known = False
        self._layout = ExpertLayout(0, np.zeros((0, 0, 0), dtype=np.int32))
        self.expert_bytes = 0
        self.ranks_per_host = 0
        self._numbers = itertools.count(1)
        self._lock = asyncio.Lock()
        self._rounds: set[asyncio.Task[None]] = set()

    @property
    def layout(self) -> ExpertLayout:
        return self._layout

    async def read_layout(self) -> None:
        """Take over what the ranks say; they must agree."""
        answers = await self._call("omni_expert_layout")
        first = answers[0]
        if any(answer != first for answer in answers):
            raise Unavailable("the ranks hold different layouts", reason="rank_failed")
        physical = np.frombuffer(first["physical"], dtype="<i4").reshape(first["shape"])
        self._layout = ExpertLayout(first["version"], physical)
        self._dropped = tuple(first["dropped"])
        self.expert_bytes = first["expert_bytes"]
        self.ranks_per_host = _ranks_per_host(first["hosts"])
        self._is_known = True

    async def take_load(self) -> ExpertLoad:
        if not self._is_known and not self._lock.locked():
            await self.read_layout()
        layers, ranks, _ = self._layout.physical.shape
        answers = [answer for answer in await self._call("omni_expert_load") if answer["counts"]]

        def summed(name: str, width: int) -> Any:
            counts = [np.frombuffer(answer[name], dtype="<i8").reshape(layers, width) for answer in answers]
            return np.sum(counts, axis=0, dtype=np.int64)

        return ExpertLoad(
            tokens=summed("tokens", self._num_experts),
            rank_tokens=summed("rank_tokens", ranks),
            layout_version=answers[0]["version"],
            steps=max(answer["steps"] for answer in answers),
            duration_ms=max(answer["duration_ms"] for answer in answers),
            routed_tokens=sum(answer["routed_tokens"] for answer in answers),
        )

    async def move(self, moves: Sequence[ExpertMove], layout: ExpertLayout) -> None:
        """One round, as `Engine.move_experts`. Goes on to its end even if the caller leaves."""
        task = asyncio.create_task(self._move(tuple(moves), layout), name="vllm-expert-round")
        self._rounds.add(task)
        task.add_done_callback(self._rounds.discard)
        await asyncio.shield(task)

    async def drop(self, ranks: Sequence[int]) -> None:
        """As `Engine.drop_ranks`; with no rank, all are routed to again."""
        async with self._lock:
            num_ranks = self._layout.physical.shape[1]
            if any(not 0 <= rank < num_ranks for rank in ranks):
                raise InvalidRequest(f"ranks are numbered from 0 to {num_ranks - 1}", field="ranks")
            self._require_homes(self._layout, ranks)
            await self._call("omni_drop_ranks", sorted(set(ranks)))
            self._dropped = tuple(sorted(set(ranks)))

    async def digests(self) -> list[list[list[str]]]:
        """SHA-256 of the weights in each slot: ranks, layers, slots."""
        return await self._call("omni_expert_digests")

    async def _move(self, moves: tuple[ExpertMove, ...], layout: ExpertLayout) -> None:
        async with self._lock:
            if not self._is_known:
                await self.read_layout()
            check_round(self._layout.physical, moves, layout.physical, self._num_experts)
            # A rank that is given an expert again is in use again.
            receiving = {move.target_rank for move in moves if move.source_rank != move.target_rank}
            dropped = tuple(rank for rank in self._dropped if rank not in receiving)
            self._require_homes(layout, dropped)
            physical = np.array(layout.physical, dtype="<i4")
            message = {
                "number": next(self._numbers),
                "version": layout.version,
                "moves": [list(astuple(move)) for move in moves],
                "physical": physical.tobytes(),
                "dropped": list(dropped),
            }
            self._is_known = False
            outcomes = await self._run(message)
            _raise_failed(outcomes)
            self._layout, self._dropped, self._is_known = ExpertLayout(layout.version, physical), dropped, True
            pause_ms = max(outcome["pause_ms"] for outcome in outcomes)
            figures = {"layout_version": layout.version, "moves": len(moves), "pause_ms": round(pause_ms, 2)}
            log.info("expert round applied", extra=figures)

    async def _run(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's outcome of the round; an error where it was not applied."""
        outcomes = await self._call("omni_expert_round", message, self._data_parallel, timeout_s=_ROUND_TIMEOUT_S)
        deadline_s = asyncio.get_running_loop().time() + _ROUND_TIMEOUT_S
        while not _are_of(outcomes, message["number"]) and asyncio.get_running_loop().time() < deadline_s:
            await self._nudge()
            await asyncio.sleep(_POLL_S)
            outcomes = await self._call("omni_expert_outcome")
        if not _are_of(outcomes, message["number"]):
            outcomes = await self._call("omni_expert_disarm")
        late = {"error": f"no common step within {_ROUND_TIMEOUT_S:.0f} s", "is_at_fault": False, "pause_ms": 0.0}
        return [outcome if outcome["number"] == message["number"] else late for outcome in outcomes]

    def _require_homes(self, layout: ExpertLayout, dropped: Sequence[int]) -> None:
        usable = ~ranks_mask(layout.physical.shape[1], dropped)
        if lost := homeless(layout.physical, self._num_experts, usable):
            named = ", ".join(f"{expert} of layer {layer}" for layer, expert in lost[:8])
            rest = f" and {len(lost) - 8} more" if len(lost) > 8 else ""
            raise InvalidRequest(f"no other rank holds expert {named}{rest}", field="ranks")

    async def _call(self, method: str, *args: Any, timeout_s: float = _CALL_TIMEOUT_S) -> list[Any]:
        """Every worker's answer, in the order of ranks. Raises Unavailable when the engine is dead or silent."""
        call = asyncio.ensure_future(self._core.call_utility_all_async("collective_rpc", method, timeout_s, args, None))
        await asyncio.wait({call, self._dead}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not call.done():
            call.cancel()
            detail = self._dead.result() if self._dead.done() else f"{method}: no answer within {timeout_s:.0f} s"
            raise Unavailable(detail, reason="engine_dead" if self._dead.done() else "rank_failed")
        if (error := call.exception()) is not None:
            raise Unavailable(f"{method}: {error}", reason="rank_failed")
        return [answer for answers in call.result() for answer in answers]


def _raise_failed(outcomes: list[dict[str, Any]]) -> None:
    errors = [f"rank {rank}: {outcome['error']}" for rank, outcome in enumerate(outcomes) if outcome["error"]]
    at_fault = [rank for rank, outcome in enumerate(outcomes) if outcome["is_at_fault"]]
    if not errors:
        return
    message = f"experts were not moved: {'; '.join(errors)}"
    if 0 < len(at_fault) < len(outcomes):
        raise RanksFailed(message, at_fault)
    raise Unavailable(message, reason="round_failed")


def _ranks_per_host(hosts: list[int]) -> int:
    """How many consecutive ranks share a host; 0 where all do, or where hosts hold unlike numbers of them."""
    size = hosts.count(hosts[0])
    is_regular = all(host == hosts[rank // size * size] for rank, host in enumerate(hosts))
    return size if is_regular and len(hosts) % size == 0 and size < len(hosts) else 0


def _are_of(outcomes: list[dict[str, Any]], number: int) -> bool:
    return all(outcome["number"] == number for outcome in outcomes)
