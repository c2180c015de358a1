"""The experts of one worker process: their weights, the map they are routed by, and the load they see.

An `ExpertState` stands in the model runner where vLLM keeps its own load balancer, and is called by the same two
hooks: before a forward pass with the number of real tokens, and at the end of every step, dummy steps included. Other
than vLLM's it decides nothing: what to move comes from outside, one round at a time.

A round, on every rank:

    prepare    check, allocate, read what is to be sent; all ranks agree, else nothing has happened
    exchange   send and receive; slots in use are not touched
    commit     all ranks agree, else what was received is dropped; then slots are written and the map changes

Under tensor parallelism a call reaches all workers between the same two steps and the round runs in the call. Under
data parallelism engine cores answer calls between different steps, so a round is armed by a call and runs at the first
step boundary where all ranks find that all have it armed. Data-parallel ranks take every step together.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from omni_engine.ports import ExpertMove
from omni_engine.vllm_expert_maps import (
    Physical,
    check_round,
    initial_layout,
    logical_counts,
    ranks_mask,
    routing_tables,
)
from omni_engine.vllm_experts import AGREE_EVERY_STEPS, NUDGE


@dataclass(frozen=True, slots=True)
class Round:
    """`number` names it; `version` and `physical` are the layout after it; nothing is routed to `dropped` ranks."""

    number: int
    version: int
    moves: tuple[ExpertMove, ...]
    physical: Physical
    dropped: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """`error` is empty where the round was applied; `is_at_fault` where this rank could not do its part.

    `pause_ms` is how long it did not serve.
    """

    number: int = 0
    error: str = ""
    is_at_fault: bool = False
    pause_ms: float = 0.0


@dataclass(slots=True)
class _Parcels:
    """Weights of this rank's moves as bytes, by the move's index in the round."""

    sent: dict[int, torch.Tensor] = field(default_factory=dict)
    received: dict[int, torch.Tensor] = field(default_factory=dict)


class ExpertState:
    """One worker's part of the expert-parallel group; ranks and slots as in `vllm_expert_maps`."""

    is_async = False

    def __init__(
        self, model: Any, group: Any, data_parallel_size: int, *, num_batches: int, counts: bool, runner: Any
    ) -> None:
        """`group` is vLLM's coordinator of the expert-parallel ranks; of the `runner` the input batch is read.

        A step has `num_batches` batches at most; `counts` where no other rank reports the same tokens.
        """
        self._group = group
        self._rank: int = group.rank_in_group
        self._runner = runner
        self._counts = counts
        self._num_experts: int = model.num_logical_experts
        ranks: int = group.world_size
        self.version = 0
        self.physical = initial_layout(model.num_moe_layers, self._num_experts, ranks, model.num_local_physical_experts)
        self.dropped: tuple[int, ...] = ()
        self.armed: Round | None = None
        self.outcome = Outcome()
        self._has_lockstep = data_parallel_size > 1
        self._boundaries = 0
        group_size = ranks // data_parallel_size
        self._near = np.arange(ranks) // group_size == self._rank // group_size
        self.hosts = _hosts(group)
        self._make_tensors(model, num_batches)

    def _make_tensors(self, model: Any, num_batches: int) -> None:
        layers, ranks, slots = self.physical.shape
        device = next(model.parameters()).device
        self._seen = torch.zeros(layers, ranks * slots, dtype=torch.int32, device=device)
        self._total = torch.zeros(layers, ranks * slots, dtype=torch.int64, device=device)
        self._table = torch.zeros(layers, self._num_experts, ranks, dtype=torch.int64, device=device)
        self._choices = torch.zeros(layers, self._num_experts, dtype=torch.int64, device=device)
        self._real_tokens = [torch.zeros((), dtype=torch.int32, device=device) for _ in range(num_batches)]
        model.set_eplb_state(self._seen, self._table, self._choices)
        record = torch.ones((), dtype=torch.bool, device=device)
        for layer in model.moe_layers:
            layer.eplb_state.should_record_tensor = record
            layer.eplb_state.num_unpadded_tokens_tensors = self._real_tokens
        self._weights: Sequence[Sequence[torch.Tensor]] = model.expert_weights
        self._reset_load()
        self._route()

    # Hooks of the model runner

    def prepare_forward(self, model_config: Any, num_unpadded_tokens: int, ubatch_slices: Any = None) -> None:
        self._step_tokens = num_unpadded_tokens
        self._step_began_s = time.perf_counter()
        if ubatch_slices is None:
            self._real_tokens[0].fill_(num_unpadded_tokens)
            return
        for tokens, part in zip(self._real_tokens, ubatch_slices, strict=False):
            bounds = part.token_slice
            tokens.fill_(max(0, min(num_unpadded_tokens, bounds.stop) - bounds.start))

    def step(self, is_dummy: bool = False, is_profile: bool = False, log_stats: bool = False) -> None:
        is_counted = not is_dummy and not is_profile
        if is_counted and not all(name.startswith(NUDGE) for name in self._runner.input_batch.req_ids):
            self._total += self._seen
            self._steps += 1
            self._tokens += self._step_tokens
            self._busy_s += time.perf_counter() - self._step_began_s
        self._seen.zero_()
        if self._has_lockstep and not is_profile:
            self._apply_if_all_armed()

    # Calls from the service, between steps

    def apply(self, round_: Round) -> Outcome:
        """Run a round; a collective of all ranks. Where one cannot, all keep the former map."""
        began_s = time.perf_counter()
        parcels = _Parcels()
        error = self._attempt(self._prepare, round_, parcels)
        if not (failed := self._any_failed(error)):
            error = self._attempt(self._exchange, round_, parcels)
            failed = self._any_failed(error)
        if not failed:
            self._commit(round_, parcels)
        pause_ms = (time.perf_counter() - began_s) * 1e3
        self.outcome = Outcome(round_.number, error or "another rank failed" * failed, bool(error), pause_ms)
        self.armed = None
        return self.outcome

    def drop(self, ranks: Sequence[int]) -> None:
        """Route nothing to these ranks from the next step on; to all others again."""
        self.dropped = tuple(ranks)
        self._route()

    def take_load(self) -> dict[str, Any]:
        """Counts since the last call, little-endian int64; `rank_tokens` since the layout last changed."""
        layers, ranks, slots = self.physical.shape
        total = self._total.cpu().numpy()
        tokens = self._carried + logical_counts(total, self.physical, self._num_experts)
        rank_tokens = total.reshape(layers, ranks, slots).sum(axis=2)
        load = {
            "counts": self._counts,
            "tokens": tokens.astype("<i8").tobytes(),
            "rank_tokens": rank_tokens.astype("<i8").tobytes(),
            "version": self.version,
            "steps": self._steps,
            "duration_ms": self._busy_s * 1e3,
            "routed_tokens": self._tokens,
        }
        self._reset_load()
        return load

    @property
    def expert_bytes(self) -> int:
        """Weights of one expert of one layer."""
        return self._bytes_of(0)

    def digests(self) -> list[list[str]]:
        """SHA-256 of all weights in each of this rank's slots, by layer."""
        return [
            [hashlib.sha256(self._read(layer, slot).numpy().tobytes()).hexdigest() for slot in range(len(first))]
            for layer, (first, *_) in enumerate(self._weights)
        ]

    # A round

    def _apply_if_all_armed(self) -> None:
        self._boundaries += 1
        if self._boundaries % AGREE_EVERY_STEPS:
            return
        number = self.armed.number if self.armed is not None else 0
        offer = torch.tensor([number, -number])
        dist.all_reduce(offer, op=dist.ReduceOp.MIN, group=self._group.cpu_group)
        if self.armed is not None and offer.tolist() == [number, -number]:
            self.apply(self.armed)

    def _prepare(self, round_: Round, parcels: _Parcels) -> None:
        check_round(self.physical, round_.moves, round_.physical, self._num_experts)
        for index, move in enumerate(round_.moves):
            if move.source_rank == self._rank:
                parcels.sent[index] = self._read(move.layer, move.source_slot)
            if move.target_rank == self._rank:
                parcels.received[index] = torch.empty(self._bytes_of(move.layer), dtype=torch.uint8)

    def _exchange(self, round_: Round, parcels: _Parcels) -> None:
        pending: list[Any] = []
        peers, group = self._group.ranks, self._group.cpu_group
        for index, move in enumerate(round_.moves):
            if move.source_rank == move.target_rank:
                if index in parcels.sent:
                    parcels.received[index] = parcels.sent[index]
            elif index in parcels.sent:
                pending.append(dist.isend(parcels.sent[index], peers[move.target_rank], group=group, tag=index))
            elif index in parcels.received:
                pending.append(dist.irecv(parcels.received[index], peers[move.source_rank], group=group, tag=index))
        for work in pending:
            work.wait()

    def _commit(self, round_: Round, parcels: _Parcels) -> None:
        for index, weights in parcels.received.items():
            self._write(round_.moves[index].layer, round_.moves[index].target_slot, weights)
        self._carried += logical_counts(self._total.cpu().numpy(), self.physical, self._num_experts)
        self._total.zero_()
        self.physical = round_.physical
        self.version = round_.version
        self.drop(round_.dropped)

    def _attempt(self, part: Callable[[Round, _Parcels], None], round_: Round, parcels: _Parcels) -> str:
        try:
            part(round_, parcels)
        except Exception as error:
            return str(error) or type(error).__name__
        return ""

    def _any_failed(self, error: str) -> bool:
        verdict = torch.tensor([int(bool(error))])
        dist.all_reduce(verdict, op=dist.ReduceOp.MAX, group=self._group.cpu_group)
        return bool(verdict.item())

    def _bytes_of(self, layer: int) -> int:
        return sum(weights[0].nbytes for weights in self._weights[layer])

    def _read(self, layer: int, slot: int) -> torch.Tensor:
        """All weights of a slot as bytes on the host."""
        return torch.cat([weights[slot].view(torch.uint8) for weights in self._weights[layer]]).cpu()

    def _write(self, layer: int, slot: int, content: torch.Tensor) -> None:
        places = [weights[slot].view(torch.uint8) for weights in self._weights[layer]]
        for place, part in zip(places, torch.split(content, [len(place) for place in places]), strict=True):
            place.copy_(part)

    def _route(self) -> None:
        usable = ~ranks_mask(self.physical.shape[1], self.dropped)
        same_host = self.hosts == self.hosts[self._rank]
        table, choices = routing_tables(self.physical, self._num_experts, self._near, same_host, usable)
        self._table.copy_(torch.from_numpy(table))
        self._choices.copy_(torch.from_numpy(choices))

    def _reset_load(self) -> None:
        self._carried = np.zeros((len(self.physical), self._num_experts), dtype=np.int64)
        self._total.zero_()
        self._steps = self._tokens = self._step_tokens = 0
        self._busy_s = self._step_began_s = 0.0


def _hosts(group: Any) -> npt.NDArray[np.int64]:
    """A number for each rank's machine; containers of one machine share its boot id."""
    boot_ids: list[str] = [""] * group.world_size
    dist.all_gather_object(boot_ids, Path("/proc/sys/kernel/random/boot_id").read_text(), group=group.cpu_group)
    return np.array([boot_ids.index(boot_id) for boot_id in boot_ids])
