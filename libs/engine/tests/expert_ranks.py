"""Three processes that talk over gloo as vLLM's workers do, with experts whose weights name them."""

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from omni_engine.ports import ExpertMove
from omni_engine.vllm_expert_state import ExpertState, Round
from omni_engine.vllm_experts import AGREE_EVERY_STEPS

RANKS, EXPERTS, SLOTS, LAYERS = 3, 6, 3, 2
# Ranks hold experts 0-2, 3-5 and 0-2 of both layers at first.
MOVES = (
    ExpertMove(0, 5, 1, 2, 0, 0),
    ExpertMove(0, 0, 0, 0, 1, 2),
    ExpertMove(1, 4, 1, 1, 2, 1),
)


class Model(torch.nn.Module):
    """Weights whose values name their layer and expert; a bias of another width and type beside them."""

    num_moe_layers, num_logical_experts, num_local_physical_experts = LAYERS, EXPERTS, SLOTS

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        held = [(rank * SLOTS + slot) % EXPERTS for slot in range(SLOTS)]
        self.expert_weights = [
            [
                torch.tensor([[100.0 * layer + expert] * 4 for expert in held], dtype=torch.bfloat16),
                torch.tensor([[1000.0 * layer + expert] * 3 for expert in held]),
            ]
            for layer in range(LAYERS)
        ]
        self.moe_layers = [SimpleNamespace(eplb_state=SimpleNamespace()) for _ in range(LAYERS)]

    def set_eplb_state(self, seen: torch.Tensor, table: torch.Tensor, choices: torch.Tensor) -> None:
        self.seen, self.table, self.choices = seen, table, choices

    def values(self) -> list[list[list[float]]]:
        return [[weights[:, 0].tolist() for weights in layer] for layer in self.expert_weights]


def after(state: ExpertState, moves: tuple[ExpertMove, ...]) -> Any:
    physical = state.physical.copy()
    for move in moves:
        physical[move.layer, move.target_rank, move.target_slot] = move.expert
    return physical


def applied(rank: int, state: ExpertState, model: Model) -> Any:
    outcome = state.apply(Round(1, 7, MOVES, after(state, MOVES)))
    return outcome.error, state.version, state.physical, model.values()


def one_rank_fails(rank: int, state: ExpertState, model: Model) -> Any:
    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    if rank == 1:
        state._read = fail  # type: ignore[method-assign]
    outcome = state.apply(Round(1, 7, MOVES, after(state, MOVES)))
    return outcome.error, state.version, state.physical, model.values()


def armed_at_different_steps(rank: int, state: ExpertState, model: Model) -> Any:
    """Rank 0 hears of the round an age before the others; the last rank just before a common boundary."""
    versions = []
    for step in range(4 * AGREE_EVERY_STEPS):
        if step == rank * AGREE_EVERY_STEPS + rank:
            state.armed = Round(1, 7, MOVES, after(state, MOVES))
        state.step(is_dummy=step % 2 == rank % 2)
        versions.append(state.version)
    return versions


def counted(rank: int, state: ExpertState, model: Model) -> Any:
    """A real step, a dummy step, a nudge, a round, and one more real step."""
    for names, is_dummy in ((["a"], False), (["a"], True), (["omni-nudge#1"], False)):
        state._runner.input_batch.req_ids = names
        state.prepare_forward(None, 2)
        model.seen[:, rank] += 2
        state.step(is_dummy=is_dummy)
    state.apply(Round(1, 7, MOVES, after(state, MOVES)))
    state._runner.input_batch.req_ids = ["a"]
    state.prepare_forward(None, 3)
    model.seen[:, 8] += 3
    state.step()
    load = state.take_load()
    tokens = np.frombuffer(load["tokens"], dtype="<i8").reshape(LAYERS, EXPERTS)
    rank_tokens = np.frombuffer(load["rank_tokens"], dtype="<i8").reshape(LAYERS, RANKS)
    empty = np.frombuffer(state.take_load()["tokens"], dtype="<i8")
    return tokens, rank_tokens, load["steps"], load["routed_tokens"], load["version"], empty.sum()


# Each with the number of data-parallel groups.
SCENARIOS: dict[str, tuple[Callable[[int, ExpertState, Model], Any], int]] = {
    "applied": (applied, 1),
    "one_rank_fails": (one_rank_fails, 1),
    "counted": (counted, 1),
    "armed_at_different_steps": (armed_at_different_steps, RANKS),
}


def run(rank: int, store: str, results: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    group = SimpleNamespace(rank_in_group=rank, world_size=RANKS, ranks=list(range(RANKS)), cpu_group=dist.group.WORLD)
    answers = {}
    for name, (scenario, data_parallel) in SCENARIOS.items():
        model = Model(rank)
        runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["a"]))
        state = ExpertState(model, group, data_parallel, num_batches=1, counts=True, runner=runner)
        answers[name] = scenario(rank, state, model)
    results.put((rank, answers))
    dist.barrier()
    dist.destroy_process_group()


def on_all_ranks(folder: Path) -> dict[str, list[Any]]:
    """What each scenario returned, rank by rank."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=run, args=(rank, str(folder / "store"), results)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    try:
        answers = dict(results.get(timeout=100) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return {name: [answers[rank][name] for rank in range(RANKS)] for name in SCENARIOS}
