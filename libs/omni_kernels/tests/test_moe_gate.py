"""Routing: as DeepSeek and Qwen publish it, copies as the engines choose them, by meaning and on the CPU."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_kernels.load import kernels_of
from omni_kernels.ops.moe_gate import MOE_GATE, moe_gate, spare_copies

Gate = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
GATES = {"meaning": MOE_GATE.meaning, "cpu": kernels_of("cpu")["moe_gate"]}


@pytest.fixture(params=GATES)
def gate(request: pytest.FixtureRequest) -> Gate:
    return GATES[request.param]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def published_deepseek_v3(
    logits: np.ndarray, bias: np.ndarray, top_k: int, groups: int, kept: int, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Section 2.1.2 of the DeepSeek-V3 report in float64: weights (T, E), 0 where not chosen, and what is chosen."""
    weights = np.zeros(logits.shape)
    chosen = np.zeros(logits.shape, dtype=bool)
    for token, row in enumerate(logits.astype(np.float64)):
        affinity = 1 / (1 + np.exp(-row))
        biased = affinity + bias
        by_group = np.split(np.arange(len(row)), groups)
        worth = [sum(sorted(biased[members])[-2:]) for members in by_group]
        eligible = np.concatenate([by_group[g] for g in np.argsort(worth)[-kept:]])
        best = eligible[np.argsort(biased[eligible])[-top_k:]]
        chosen[token, best] = True
        weights[token, best] = affinity[best] / affinity[best].sum() * scale
    return weights, chosen


def spread(values: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    return torch.zeros(len(values), num_experts).scatter_(1, experts.long(), values)


def test_is_deepseek_v3_as_published(gate: Gate) -> None:
    logits = torch.randn(40, 256, generator=seeded(1)) * 2
    bias = torch.randn(256, generator=seeded(2)) / 5
    weights, experts, slots, counts = gate(logits, bias, 8, "sigmoid", 8, 4, True, 2.5, None, 256, 0)
    expected, chosen = published_deepseek_v3(logits.numpy(), bias.numpy(), 8, 8, 4, 2.5)
    assert spread(torch.ones_like(weights), experts, 256).bool().equal(torch.from_numpy(chosen))
    np.testing.assert_allclose(spread(weights, experts, 256), expected, rtol=1e-5)
    assert slots.equal(experts)
    assert counts.tolist() == chosen.sum(0).tolist()


@pytest.mark.parametrize("renormalize", [True, False])
def test_is_the_router_of_qwen3_moe(gate: Gate, renormalize: bool) -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = modeling.Qwen3MoeConfig(num_experts=64, num_experts_per_tok=8, hidden_size=32, norm_topk_prob=renormalize)
    router = modeling.Qwen3MoeTopKRouter(config)
    torch.nn.init.normal_(router.weight, generator=seeded(3))
    with torch.no_grad():
        logits, expected, chosen = router(torch.randn(50, 32, generator=seeded(4)))
    weights, experts, _, _ = gate(logits, None, 8, "softmax", 1, 1, renormalize, 1.0, None, 64, 0)
    assert experts.tolist() == chosen.tolist()
    torch.testing.assert_close(weights, expected)


def test_is_the_router_of_deepseek_v3(gate: Gate) -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = modeling.DeepseekV3Config(
        n_routed_experts=32, num_experts_per_tok=6, hidden_size=16, n_group=4, topk_group=2, routed_scaling_factor=2.5
    )
    router = modeling.DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight, generator=seeded(5))
    router.e_score_correction_bias.copy_(torch.randn(32, generator=seeded(6)) / 5)
    with torch.no_grad():
        logits, expected, chosen = router(torch.randn(50, 16, generator=seeded(7)))
    weights, experts, _, _ = gate(logits, router.e_score_correction_bias, 6, "sigmoid", 4, 2, True, 2.5, None, 32, 0)
    torch.testing.assert_close(spread(weights, experts, 32), spread(expected, chosen, 32))


def test_the_bias_chooses_but_does_not_weigh(gate: Gate) -> None:
    bias = torch.tensor([0.0, 0.0, 0.0, 9.0])
    weights, experts, _, _ = gate(torch.zeros(1, 4), bias, 2, "sigmoid", 1, 1, True, 1.0, None, 4, 0)
    assert experts.tolist() == [[3, 0]]
    assert weights.tolist() == [[0.5, 0.5]]


def test_of_equals_the_lower_number_wins(gate: Gate) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 1.0, 2.0, 0.0, 2.0]])
    assert gate(logits, None, 3, "softmax", 1, 1, True, 1.0, None, 8, 0)[1].tolist() == [[1, 2, 3]]
    grouped = gate(logits, None, 3, "softmax", 4, 2, True, 1.0, None, 8, 0)
    assert grouped[1].tolist() == [[1, 2, 3]]
    biased = gate(logits, torch.zeros(8), 2, "sigmoid", 4, 1, True, 1.0, None, 8, 0)
    assert biased[1].tolist() == [[2, 3]]


def test_scores_that_are_all_zero_give_zero_weights_not_nan(gate: Gate) -> None:
    weights, *_ = gate(torch.full((1, 4), -200.0), None, 2, "sigmoid", 1, 1, True, 1.0, None, 4, 0)
    assert weights.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("table", [torch.int32, torch.int64])
def test_copies_and_counts_are_those_of_the_engine(gate: Gate, table: torch.dtype) -> None:
    shims: Any = pytest.importorskip("omni_engine.vllm_expert_shims")
    maps: Any = pytest.importorskip("omni_engine.vllm_expert_maps")
    everyone = np.ones(4, dtype=bool)
    layout = maps.initial_layout(1, 16, 4, 6)
    ids, counts = maps.routing_tables(layout, 16, everyone, everyone, everyone)
    replicas, copies = torch.from_numpy(ids[0]), torch.from_numpy(counts[0])
    logits = torch.randn(90, 16, generator=seeded(8))
    real = torch.tensor(70, dtype=torch.int32)
    _, experts, slots, seen = gate(logits, None, 4, "softmax", 1, 1, True, 1.0, replicas.to(table), 24, 0, real)
    load = torch.zeros(24, dtype=torch.int64)
    engine = shims.map_and_record(experts, load, replicas, copies, torch.tensor(True), real)
    assert slots.equal(engine)
    assert seen.equal(load)


def test_a_part_of_the_tokens_takes_the_copies_it_takes_in_the_whole(gate: Gate) -> None:
    logits = torch.randn(30, 8, generator=seeded(9))
    replicas = spare_copies(8, 6, seeded(10))
    rest = (None, 2, "softmax", 1, 1, True, 1.0, replicas, 14)
    assert gate(logits, *rest, 100)[2][12:].equal(gate(logits[12:].contiguous(), *rest, 112)[2])


@pytest.mark.parametrize("copies", [2, 3, 7])
def test_copies_are_used_evenly_at_every_length(gate: Gate, copies: int) -> None:
    replicas = torch.arange(2 * copies, dtype=torch.int32).view(2, copies)
    logits = torch.tensor([[1.0, 0.0]]).repeat(600, 1)
    slots = gate(logits, None, 1, "softmax", 1, 1, True, 1.0, replicas, 2 * copies, 3)[2].flatten().long()
    used = torch.nn.functional.one_hot(slots, 2 * copies)[:, :copies].cumsum(0)
    even = torch.arange(1, 601).unsqueeze(1) / copies
    assert (used - even).abs().max() < 3  # of up to 300; drawing at random strays by 30


def test_an_expert_without_a_slot_or_with_a_slot_too_many_is_refused(gate: Gate) -> None:
    for replicas, slots in ((torch.tensor([[0], [-1]]), 2), (torch.tensor([[0], [2]]), 2)):
        with pytest.raises(ValueError, match=r"^replicas: "):
            gate(torch.zeros(1, 2), None, 2, "softmax", 1, 1, True, 1.0, replicas, slots, 0)


@pytest.mark.parametrize(
    ("changed", "argument"),
    [
        pytest.param({"logits": torch.zeros(4)}, "logits", id="one dimension"),
        pytest.param({"logits": torch.zeros(3, 8, dtype=torch.int32)}, "logits", id="integers"),
        pytest.param({"logits": torch.zeros(8, 3).T}, "logits", id="transposed"),
        pytest.param({"bias": torch.zeros(7)}, "bias", id="bias of another size"),
        pytest.param({"bias": torch.zeros(8).bfloat16()}, "bias", id="bias in bfloat16"),
        pytest.param({"top_k": 0}, "top_k", id="none"),
        pytest.param({"top_k": 5, "num_groups": 4, "top_k_groups": 2}, "top_k", id="more than the groups hold"),
        pytest.param({"scoring": "softplus"}, "scoring", id="another scoring"),
        pytest.param({"num_groups": 3}, "num_groups", id="uneven groups"),
        pytest.param({"num_groups": 0}, "num_groups", id="no groups"),
        pytest.param({"num_groups": 8, "top_k_groups": 4, "bias": torch.zeros(8)}, "num_groups", id="groups of one"),
        pytest.param({"top_k_groups": 2}, "top_k_groups", id="more groups than there are"),
        pytest.param({"scale": 0.0}, "scale", id="scale zero"),
        pytest.param({"token_offset": -1}, "token_offset", id="negative offset"),
        pytest.param({"num_slots": 9}, "num_slots", id="slots without copies"),
        pytest.param({"replicas": torch.zeros(7, 2, dtype=torch.int32)}, "replicas", id="copies of other experts"),
        pytest.param({"replicas": torch.zeros(8, 2)}, "replicas", id="copies in floats"),
        pytest.param({"replicas": torch.zeros(8, 0, dtype=torch.int32)}, "replicas", id="no room for copies"),
        pytest.param({"real_tokens": torch.zeros(1, dtype=torch.int32)}, "real_tokens", id="not a scalar"),
        pytest.param({"real_tokens": torch.tensor(1)}, "real_tokens", id="int64"),
    ],
)
def test_a_wrong_call_is_refused_by_name(changed: dict[str, Any], argument: str) -> None:
    call = {
        "logits": torch.zeros(3, 8),
        "bias": None,
        "top_k": 2,
        "scoring": "softmax",
        "num_groups": 1,
        "top_k_groups": 1,
        "renormalize": True,
        "scale": 1.0,
        "replicas": None,
        "num_slots": 8,
        "token_offset": 0,
    }
    with pytest.raises(ValueError, match=f"^{argument}: "):
        moe_gate(**{**call, **changed})


@st.composite
def calls(draw: st.DrawFn) -> tuple[Any, ...]:
    groups = draw(st.sampled_from([1, 2, 4]))
    size = draw(st.integers(2, 40))
    kept = draw(st.integers(1, groups))
    experts, top_k = groups * size, draw(st.integers(1, min(8, kept * size)))
    tokens = draw(st.integers(0, 20))
    generator = seeded(draw(st.integers(0, 2**31)))
    logits = torch.randn(tokens, experts, generator=generator)
    if draw(st.booleans()):
        logits = logits.round()  # many equals
    bias = torch.randn(experts, generator=generator) / 10 if draw(st.booleans()) else None
    spare = draw(st.integers(0, experts))
    replicas = spare_copies(experts, spare, generator) if draw(st.booleans()) else None
    slots = experts + (spare if replicas is not None else 0)
    real = torch.tensor(draw(st.integers(0, tokens)), dtype=torch.int32) if draw(st.booleans()) else None
    scoring, renormalize = draw(st.sampled_from(["softmax", "sigmoid"])), draw(st.booleans())
    return (
        logits,
        bias,
        top_k,
        scoring,
        groups,
        kept,
        renormalize,
        2.5,
        replicas,
        slots,
        draw(st.integers(0, 99)),
        real,
    )


@settings(deadline=None)  # a kernel compiles when first called
@given(calls())
def test_every_routing_is_one(call: tuple[Any, ...]) -> None:
    logits, bias, top_k, _, groups, kept, renormalize, scale, replicas, num_slots, _, real = call
    MOE_GATE.check(*call)
    weights, experts, slots, counts = GATES["cpu"](*call)
    assert all(len(set(row)) == top_k for row in experts.tolist())
    assert all(len({expert // (logits.shape[1] // groups) for expert in row}) <= kept for row in experts.tolist())
    homes = experts.unsqueeze(-1) if replicas is None else replicas[experts.long()]
    assert (homes == slots.unsqueeze(-1)).any(-1).all()
    counted = len(logits) if real is None else int(real)
    assert counts.equal(torch.bincount(slots[:counted].flatten(), minlength=num_slots))
    if renormalize:
        torch.testing.assert_close(weights.sum(-1), torch.full((len(logits),), scale))
    if bias is None:
        assert (weights.diff(dim=-1) <= 1e-6).all()
    for result, meaning in zip((weights, experts, slots, counts), MOE_GATE.meaning(*call), strict=True):
        torch.testing.assert_close(result, meaning, atol=1e-6, rtol=1e-5)
