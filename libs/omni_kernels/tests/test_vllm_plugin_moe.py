"""Our router and expert method beside vLLM's on the CPU, and beside the engine's own choice of copies."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from omni_kernels.ops import OPS
from omni_kernels.vllm.bound import bound
from omni_kernels.vllm.moe import unknown_routing
from omni_kernels.vllm.router import OmniRouter

EXPERTS, TOP_K = 16, 4
SOFTMAX: dict[str, Any] = {"top_k": TOP_K, "global_num_experts": EXPERTS}
GROUPED: dict[str, Any] = SOFTMAX | {
    "use_grouped_topk": True,
    "num_expert_group": 4,
    "topk_group": 2,
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 2.5,
    "e_score_correction_bias": torch.linspace(-0.3, 0.3, EXPERTS),
}
SHAPES = {
    "softmax": SOFTMAX,
    "without renormalising": SOFTMAX | {"renormalize": False},
    "groups with a bias": GROUPED,
    "groups without": GROUPED | {"scoring_func": "softmax", "e_score_correction_bias": None},
}


def logits(tokens: int, seed: int) -> Tensor:
    return torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed))


def by_expert(weights: Tensor, experts: Tensor, slots: int = EXPERTS) -> Tensor:
    return torch.zeros(len(weights), slots).scatter_add_(1, experts.long(), weights.float())


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=10, deadline=None)
@given(tokens=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_tokens_go_where_vllm_sends_them(name: str, tokens: int, seed: int) -> None:
    x, scores = torch.zeros(tokens, 8), logits(tokens, seed)
    ours = OmniRouter(**SHAPES[name]).select_experts(x, scores)
    vllms = CPURouter(**SHAPES[name]).select_experts(x, scores)
    assert ours[1].dtype == torch.int32
    torch.testing.assert_close(by_expert(*ours), by_expert(*vllms), atol=1e-6, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 40), padding=st.integers(0, 5), copies=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_copies_and_counts_are_those_of_the_engine(tokens: int, padding: int, copies: int, seed: int) -> None:
    shims = pytest.importorskip("omni_engine.vllm_expert_shims")
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(1, copies + 1, (EXPERTS,), generator=generator)
    slots = int(count.sum())
    table = torch.full((EXPERTS, copies), -1)
    table[torch.arange(copies) < count.unsqueeze(1)] = torch.randperm(slots, generator=generator)
    ours, theirs = torch.zeros(2, slots, dtype=torch.int32)
    real = torch.tensor(max(0, tokens - padding), dtype=torch.int32)
    state = SimpleNamespace(
        logical_to_physical_map=table,
        logical_replica_count=count,
        expert_load_view=ours,
        should_record_tensor=torch.ones((), dtype=torch.bool),
        num_unpadded_tokens_tensors=[real],
    )
    scores = logits(tokens, seed)
    captured: list[Tensor] = []
    router = OmniRouter(**SOFTMAX, eplb_state=state)
    router.set_capture_fn(captured.append)
    _, physical = router.select_experts(torch.zeros(tokens, 8), scores)
    mapped = shims.map_and_record(captured[0], theirs, table, count, state.should_record_tensor, real)
    assert (physical == mapped).all()
    assert (ours == theirs).all()
    state.should_record_tensor.fill_(False)
    router.select_experts(torch.zeros(tokens, 8), scores)
    assert (ours == theirs).all()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"scoring_func": "sqrtsoftplus"}, "sqrtsoftplus"),
        ({"custom_routing_function": len}, "custom_routing_function"),
        ({"num_fused_shared_experts": 1}, "shared experts"),
        ({"scoring_func": "sigmoid", "custom_routing_function": None}, ""),
    ],
)
def test_routing_that_the_op_does_not_know_stays_vllms(options: dict[str, Any], names: str) -> None:
    reason = unknown_routing(options)
    assert (names in reason) if names else not reason


def test_a_compiled_layer_takes_any_number_of_tokens() -> None:
    """One graph, no break, for all batch sizes: neither checks nor fake forms fix the number of tokens."""
    generator = torch.Generator().manual_seed(0)
    weight, gate = torch.rand(64, generator=generator), torch.randn(EXPERTS, 64, generator=generator)
    up = torch.randn(EXPERTS, 64, 64, generator=generator)
    down = torch.randn(EXPERTS, 64, 32, generator=generator)
    norm, permute, multiply, combine = (
        bound(OPS[name]) for name in ("add_rms_norm", "moe_permute", "grouped_matmul", "moe_combine")
    )
    router = OmniRouter(**GROUPED)

    def layer(x: Tensor) -> Tensor:
        normed, total = norm(x, x, weight, 1e-6)
        weights, slots = router.select_experts(normed, normed @ gate.T)
        rows, source, sizes = permute(normed, slots, EXPERTS)
        hidden = bound(OPS["swiglu"])(multiply(rows, up.transpose(1, 2), sizes))
        combined: Tensor = combine(multiply(hidden, down.transpose(1, 2), sizes), source, weights, total)
        return combined

    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for tokens in (3, 7, 40):
        x = torch.randn(tokens, 64, generator=generator)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), layer(x))
    assert graphs == 1
