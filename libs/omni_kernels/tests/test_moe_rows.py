"""Tokens to experts' rows, products with experts' weights, and back: invariants, exactness, and a whole MoE layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from omni_kernels.load import kernels_of
from omni_kernels.ops import OPS
from omni_kernels.ops.grouped_matmul import grouped_matmul, grouped_matmul_w4a8, grouped_matmul_w8a8, pack_int4
from omni_kernels.ops.moe_experts import moe_experts
from omni_kernels.ops.moe_permute import moe_combine, moe_permute

Kernels = dict[str, Callable[..., Any]]
PRODUCTS = ("grouped_matmul", "grouped_matmul_w8a8", "grouped_matmul_w4a8")
FAMILY = ("moe_gate", "moe_permute", "moe_combine", "moe_experts", *PRODUCTS)
CPU: Kernels = {name: kernels_of("cpu")[name] for name in FAMILY}
BACKENDS = {"meaning": {name: OPS[name].meaning for name in FAMILY}, "cpu": CPU}


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Kernels:
    return BACKENDS[request.param]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moe_layer(ops: Kernels, x: Tensor, routing: tuple[Tensor, ...], gate_up: Tensor, down: Tensor) -> Tensor:
    """Experts over `x` with weights as checkpoints have them: gate_up (E, 2I, H), down (E, H, I)."""
    weights, _, slots, counts = routing
    rows, source, sizes = ops["moe_permute"](x, slots, len(gate_up))
    assert sizes.equal(counts)
    gate, up = ops["grouped_matmul"](rows, gate_up.transpose(1, 2), sizes).chunk(2, dim=-1)
    return ops["moe_combine"](
        ops["grouped_matmul"](silu(gate) * up, down.transpose(1, 2), sizes), source, weights, None
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_our_ops_make_the_moe_block_of_qwen3(ops: Kernels, dtype: torch.dtype, tolerance: float) -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = modeling.Qwen3MoeConfig(
        num_experts=16, num_experts_per_tok=4, hidden_size=64, moe_intermediate_size=48, norm_topk_prob=True
    )
    config._experts_implementation = "eager"
    block = modeling.Qwen3MoeSparseMoeBlock(config).to(dtype)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=seeded(parameter.numel()))
    x = torch.randn(1, 33, 64, generator=seeded(1)).to(dtype)
    with torch.no_grad():
        logits = block.gate(x)[0]
        routing = ops["moe_gate"](logits, None, 4, "softmax", 1, 1, True, 1.0, None, 16, 0)
        ours = moe_layer(ops, x[0], routing, block.experts.gate_up_proj, block.experts.down_proj)
        fused = ops["moe_experts"](x[0], block.experts.gate_up_proj, block.experts.down_proj, routing[0], routing[2])
        theirs = block(x)[0]
    for result in (ours, fused):
        torch.testing.assert_close(result, theirs, atol=tolerance * float(theirs.abs().max()), rtol=tolerance)


def test_ranks_that_hold_parts_of_the_slots_add_up_to_the_whole(ops: Kernels) -> None:
    x = torch.randn(20, 32, generator=seeded(2))
    logits = torch.randn(20, 8, generator=seeded(3))
    replicas = torch.tensor([[e, e + 8 if e < 4 else -1] for e in range(8)], dtype=torch.int32)
    weight = torch.randn(8, 32, 32, generator=seeded(4))
    held = torch.cat([weight, weight[:4]])  # slots 8 .. 11 are copies of experts 0 .. 3
    weights, experts, slots, _ = ops["moe_gate"](logits, None, 2, "softmax", 1, 1, True, 1.0, replicas, 12, 0)
    total = torch.zeros(20, 32)
    for rank in range(3):
        rows, source, sizes = ops["moe_permute"](x, slots - 4 * rank, 4)
        made = ops["grouped_matmul"](rows, held[4 * rank : 4 * rank + 4].contiguous(), sizes)
        total += ops["moe_combine"](made, source, weights, None)
    picked = torch.einsum("th,tkhm->tkm", x, weight[experts.long()])
    torch.testing.assert_close(total, (picked * weights.unsqueeze(-1)).sum(1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_their_parts_whatever_the_rows_of_each(ops: Kernels, tokens: int, dtype: torch.dtype) -> None:
    generator = seeded(tokens)
    x = torch.randn(tokens, 64, generator=generator).to(dtype)
    gate_up = torch.randn(6, 80, 64, generator=generator).div_(8).to(dtype)
    down = torch.randn(6, 64, 40, generator=generator).div_(6).to(dtype)
    weights = torch.rand(tokens, 3, generator=generator)
    # Slot 1 gets every token, slot 2 the first one, 0 and 3 to 5 what is left; -1 and 6 lie elsewhere.
    slots = torch.randint(-1, 7, (tokens, 3), generator=generator, dtype=torch.int32)
    slots[slots == 2] = 3
    slots[:, 0], slots[0, 1] = 1, 2
    expected = torch.zeros(tokens, 64, dtype=torch.float64)
    for token, choice in torch.nonzero((slots >= 0) & (slots < 6)).tolist():
        slot = int(slots[token, choice])
        gate, up = (gate_up[slot].double() @ x[token].double()).chunk(2)
        expected[token] += weights[token, choice].double() * (down[slot].double() @ (silu(gate) * up))
    result = ops["moe_experts"](x, gate_up, down, weights, slots)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)


@st.composite
def permutations(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    tokens, top_k, slots = draw(st.integers(0, 12)), draw(st.integers(1, 5)), draw(st.integers(1, 9))
    hidden = draw(st.integers(1, 20))
    generator = seeded(draw(st.integers(0, 2**31)))
    x = torch.randn(tokens, hidden, generator=generator).to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    return x, torch.randint(-2, slots + 2, (tokens, top_k), generator=generator, dtype=torch.int32), slots


@settings(deadline=None)  # a kernel compiles when first called
@given(permutations())
def test_rows_stand_by_slot_and_combine_brings_them_back(call: tuple[Tensor, Tensor, int]) -> None:
    x, slots, num_slots = call
    tokens, top_k = slots.shape
    rows, source, sizes = CPU["moe_permute"](*call)
    for result, meaning in zip((rows, source, sizes), OPS["moe_permute"].meaning(*call), strict=True):
        assert result.equal(meaning)
    assert source.sort().values.tolist() == list(range(tokens * top_k))
    ordered = slots.flatten()[source.long()]
    local = int(sizes.sum())
    assert ordered[:local].equal(torch.repeat_interleave(torch.arange(num_slots, dtype=torch.int32), sizes))
    assert not ((ordered[local:] >= 0) & (ordered[local:] < num_slots)).any()
    assert not rows[local:].any()
    assert (source[:local].diff()[ordered[:local].diff() == 0] > 0).all()
    weights = torch.full((tokens, top_k), 0.5)
    here = ((slots >= 0) & (slots < num_slots)).sum(1, keepdim=True)
    back = CPU["moe_combine"](rows, source, weights, x)
    torch.testing.assert_close(back, (x.float() * (1 + here / 2)).to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_combine_rounds_once(ops: Kernels, dtype: torch.dtype) -> None:
    rows = torch.randn(4 * 3, 50, generator=seeded(5)).to(dtype)
    source = torch.randperm(12, generator=seeded(6)).int()
    weights = torch.rand(4, 3, generator=seeded(7))
    residual = torch.randn(4, 50, generator=seeded(8)).to(dtype)
    exact = residual.double()
    for row, pair in enumerate(source.tolist()):
        exact[pair // 3] += weights.flatten()[pair].double() * rows[row].double()
    result = ops["moe_combine"](rows, source, weights, residual)
    step = exact.abs().clamp(min=0.01) * torch.finfo(dtype).eps
    assert ((result.double() - exact).abs() <= 0.51 * step + 2e-6).all()


def test_combine_keeps_nan_and_infinity(ops: Kernels) -> None:
    rows = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]]).bfloat16()
    combined = ops["moe_combine"](rows, torch.zeros(1, dtype=torch.int32), torch.ones(1, 1), None)
    assert combined.isnan().tolist() == [[True, False, False, False]]
    assert combined[0, 1:].tolist() == [float("inf"), -float("inf"), 1.0]


def test_combine_refuses_a_source_beyond_its_rows() -> None:
    with pytest.raises(ValueError, match=r"^source: "):
        CPU["moe_combine"](torch.ones(2, 4), torch.tensor([0, 2], dtype=torch.int32), torch.ones(1, 2), None)


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    return sizes, draw(st.integers(0, 3)), draw(st.integers(1, 48)), 2 * draw(st.integers(1, 20))


def check_products(
    sizes: list[int], x: Tensor, matrices: Tensor, result: Tensor, scale: Tensor | None = None, tolerance: float = 1e-5
) -> None:
    """`result` is x @ the matrix of its group in float64, rows times `scale`, and zero behind the groups."""
    start = 0
    for size, matrix in zip(sizes, matrices.double(), strict=True):
        rows = slice(start, start + size)
        exact = x[rows].double() @ matrix
        exact = exact if scale is None else exact * scale[rows].double().unsqueeze(1)
        torch.testing.assert_close(result[rows].double(), exact, atol=tolerance, rtol=tolerance)
        start += size
    assert not result[start:].any()


@settings(deadline=None)  # a kernel compiles when first called
@given(groups(), st.booleans())
def test_grouped_products_are_those_of_each_group(call: tuple[list[int], int, int, int], stored: bool) -> None:
    sizes, behind, depth, columns = call
    x = torch.randn(sum(sizes) + behind, depth, generator=seeded(9))
    weight = torch.randn(len(sizes), columns, depth, generator=seeded(10)).transpose(1, 2)
    weight = weight if stored else weight.contiguous()
    for ops in BACKENDS.values():
        result = ops["grouped_matmul"](x, weight, torch.tensor(sizes))
        check_products(sizes, x, weight, result)


@settings(deadline=None)  # a kernel compiles when first called
@given(groups(), st.booleans())
@example(([1, 2], 1, 1, 6), True)
def test_w8a8_is_exact_integer_arithmetic(call: tuple[list[int], int, int, int], stored: bool) -> None:
    sizes, behind, depth, columns = call
    rows = sum(sizes) + behind
    x = torch.randint(-128, 128, (rows, depth), generator=seeded(11), dtype=torch.int8)
    weight = torch.randint(-128, 128, (len(sizes), columns, depth), generator=seeded(12), dtype=torch.int8)
    weight = weight.transpose(1, 2) if stored else weight.transpose(1, 2).contiguous()
    ones = torch.ones(rows), torch.ones(len(sizes), columns)
    scales = torch.rand(rows, generator=seeded(13)), torch.rand(len(sizes), columns, generator=seeded(14))
    for ops in BACKENDS.values():
        exact = ops["grouped_matmul_w8a8"](x, ones[0], weight, ones[1], torch.tensor(sizes), torch.float32)
        check_products(sizes, x, weight, exact, tolerance=0)
        scaled = ops["grouped_matmul_w8a8"](x, scales[0], weight, scales[1], torch.tensor(sizes), torch.float32)
        check_products(sizes, x, weight.double() * scales[1].unsqueeze(1), scaled, scales[0], tolerance=1e-2)


@settings(deadline=None)  # a kernel compiles when first called
@given(groups(), st.sampled_from([1, 2, 4]))
def test_w4a8_is_exact_integer_arithmetic_of_each_block(call: tuple[list[int], int, int, int], blocks: int) -> None:
    sizes, behind, quarter, columns = call
    rows, depth = sum(sizes) + behind, 4 * quarter
    x = torch.randint(-128, 128, (rows, depth), generator=seeded(15), dtype=torch.int8)
    codes = torch.randint(-8, 8, (len(sizes), depth, columns), generator=seeded(16), dtype=torch.int8)
    scale = 2.0 ** torch.randint(-3, 3, (len(sizes), blocks, columns), generator=seeded(17))  # exact in float32
    matrices = codes.unflatten(1, (blocks, -1)).double() * scale.unsqueeze(2).double()
    for ops in BACKENDS.values():
        inputs = (x, torch.ones(rows), pack_int4(codes), scale, torch.tensor(sizes))
        check_products(
            sizes, x, matrices.flatten(1, 2), ops["grouped_matmul_w4a8"](*inputs, torch.float32), tolerance=0
        )


def test_a_long_product_of_extreme_integers_does_not_overflow(ops: Kernels) -> None:
    depth = 18432
    x = torch.full((1, depth), -128, dtype=torch.int8)
    weight = torch.full((1, depth, 1), -128, dtype=torch.int8)
    one = torch.ones(1)
    result = ops["grouped_matmul_w8a8"](x, one, weight, torch.ones(1, 1), torch.tensor([1]), torch.float32)
    assert result.item() == 128 * 128 * depth


@pytest.mark.parametrize("sizes", [[2, -1], [3, 2]])
def test_group_sizes_that_cannot_be_are_refused(ops: Kernels, sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^group_sizes: "):
        ops["grouped_matmul"](torch.ones(4, 8), torch.ones(2, 8, 8), torch.tensor(sizes))


I8, I32 = torch.int8, torch.int32
ROWS, SOURCE, SIZES = torch.ones(6, 8), torch.arange(6, dtype=I32), torch.tensor([2, 4])
X8, W8, SCALE, COLUMNS = torch.ones(6, 8, dtype=I8), torch.ones(2, 8, 4, dtype=I8), torch.ones(6), torch.ones(2, 4)
GATE_UP, DOWN, PICKED, SLOTS = torch.ones(2, 6, 8), torch.ones(2, 8, 3), torch.ones(6, 2), torch.ones(6, 2, dtype=I32)
W4, BLOCKS = torch.ones(2, 8, 2, dtype=I8), torch.ones(2, 2, 4)


@pytest.mark.parametrize(
    ("call", "inputs", "argument"),
    [
        pytest.param(moe_permute, (ROWS[0], SOURCE.view(6, 1), 4), "x", id="tokens of one dimension"),
        pytest.param(moe_permute, (ROWS.double(), SOURCE.view(6, 1), 4), "x", id="float64"),
        pytest.param(moe_permute, (ROWS, SOURCE.view(3, 2), 4), "slots", id="slots of other tokens"),
        pytest.param(moe_permute, (ROWS, SOURCE.view(6, 1).long(), 4), "slots", id="int64 slots"),
        pytest.param(moe_permute, (ROWS, SOURCE.view(6, 1)[:, :0], 4), "slots", id="no slots"),
        pytest.param(moe_permute, (ROWS, SOURCE.view(6, 1), 0), "num_slots", id="nowhere to go"),
        pytest.param(moe_combine, (ROWS, SOURCE, torch.ones(3, 3), None), "weights", id="weights of other rows"),
        pytest.param(moe_combine, (ROWS, SOURCE, torch.ones(3, 2).half(), None), "weights", id="half weights"),
        pytest.param(moe_combine, (ROWS, SOURCE[:5], torch.ones(3, 2), None), "source", id="short source"),
        pytest.param(moe_combine, (ROWS, SOURCE, torch.ones(3, 2), ROWS), "residual", id="residual of rows"),
        pytest.param(moe_combine, (ROWS, SOURCE, torch.ones(3, 2), ROWS[:3].half()), "residual", id="half residual"),
        pytest.param(moe_experts, (ROWS, GATE_UP[..., :7], DOWN, PICKED, SLOTS), "gate_up", id="another hidden size"),
        pytest.param(moe_experts, (ROWS, GATE_UP[:, :5], DOWN, PICKED, SLOTS), "gate_up", id="odd gate and up"),
        pytest.param(moe_experts, (ROWS, GATE_UP, DOWN.transpose(1, 2), PICKED, SLOTS), "down", id="down transposed"),
        pytest.param(moe_experts, (ROWS, GATE_UP, DOWN, PICKED[:, :1], SLOTS), "weights", id="a weight missing"),
        pytest.param(moe_experts, (ROWS, GATE_UP, DOWN, PICKED, SLOTS.long()), "slots", id="slots in int64"),
        pytest.param(grouped_matmul, (ROWS, torch.ones(2, 7, 4), SIZES), "weight", id="another depth"),
        pytest.param(grouped_matmul, (ROWS, torch.ones(2, 8, 4).half(), SIZES), "weight", id="another dtype"),
        pytest.param(grouped_matmul, (ROWS, torch.ones(2, 8, 8)[..., ::2], SIZES), "weight", id="with gaps"),
        pytest.param(grouped_matmul, (ROWS, torch.ones(2, 8, 4), SIZES.int()), "group_sizes", id="int32 sizes"),
        pytest.param(grouped_matmul, (ROWS, torch.ones(2, 8, 4), SIZES[:1]), "group_sizes", id="a size missing"),
        pytest.param(grouped_matmul_w8a8, (ROWS, SCALE, W8, COLUMNS, SIZES, torch.float32), "x", id="x not quantized"),
        pytest.param(
            grouped_matmul_w8a8, (X8, SCALE[:5], W8, COLUMNS, SIZES, torch.float32), "row_scale", id="a scale missing"
        ),
        pytest.param(
            grouped_matmul_w8a8, (X8, SCALE, W8, COLUMNS[0], SIZES, torch.float32), "column_scale", id="one group's"
        ),
        pytest.param(
            grouped_matmul_w8a8, (X8, SCALE, W8, COLUMNS, SIZES, torch.int32), "out_dtype", id="integer result"
        ),
        pytest.param(
            grouped_matmul_w4a8, (X8, SCALE, W8, BLOCKS, SIZES, torch.float32), "group_scale", id="unpacked weight"
        ),
        pytest.param(
            grouped_matmul_w4a8,
            (X8, SCALE, W4, torch.ones(2, 3, 4), SIZES, torch.float32),
            "group_scale",
            id="blocks that do not divide",
        ),
    ],
)
def test_a_wrong_call_is_refused_by_name(call: Callable[..., Any], inputs: tuple[Any, ...], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: "):
        call(*inputs)
