"""Norms, rotation, gated activation and quantization mean what torch, transformers and arithmetic say they mean."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import glu

from omni_kernels.ops.quant import dynamic_quant
from omni_kernels.ops.rms_norm import add_rms_norm, add_rms_norm_quant, rms_norm, rms_norm_quant
from omni_kernels.ops.rotary import rotary
from omni_kernels.ops.swiglu import dequant_swiglu_quant, swiglu, swiglu_quant

FEW = settings(max_examples=30, deadline=None)
FINITE = st.floats(-1e4, 1e4, width=32)
ROWS = st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(FINITE, min_size=n, max_size=n), min_size=1, max_size=4))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def test_norm_is_torchs(generator: torch.Generator) -> None:
    x, weight = torch.randn(5, 3, 64, generator=generator), torch.rand(64, generator=generator)
    wanted = torch.nn.functional.rms_norm(x.double(), (64,), weight.double(), 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), wanted, atol=1e-6, rtol=1e-5)


def test_norm_is_that_of_deepseek_in_transformers(generator: torch.Generator) -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    norm = modeling.DeepseekV3RMSNorm(96, eps=1e-6)
    norm.weight.data.uniform_(0.5, 1.5, generator=generator)
    x = torch.randn(4, 96, generator=generator)
    torch.testing.assert_close(rms_norm(x, norm.weight.detach(), 1e-6), norm(x).detach(), atol=1e-6, rtol=1e-5)


def test_a_residual_is_added_before_the_norm_and_handed_on(generator: torch.Generator) -> None:
    x, residual = torch.randn(2, 4, 64, generator=generator).bfloat16().unbind()
    weight = torch.rand(64, generator=generator).bfloat16()
    y, total = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    wanted = torch.nn.functional.rms_norm(x.double() + residual.double(), (64,), weight.double(), 1e-6)
    torch.testing.assert_close(y.double(), wanted, atol=1e-3, rtol=4e-3)
    q, scale, same = add_rms_norm_quant(x, residual, weight, 1e-6)
    assert torch.equal(same, total)
    torch.testing.assert_close(q * scale.unsqueeze(-1), wanted.float(), atol=float(scale.max()) * 0.51, rtol=0)


def test_a_quantized_norm_is_that_of_the_unrounded_norm(generator: torch.Generator) -> None:
    x, weight = torch.randn(3, 256, generator=generator).half(), torch.rand(256, generator=generator).half()
    q, scale = rms_norm_quant(x, weight, 1e-6)
    wanted = dynamic_quant(rms_norm(x.float(), weight.float(), 1e-6))
    assert torch.equal(q, wanted[0])
    torch.testing.assert_close(scale, wanted[1])


@FEW
@given(rows=ROWS, dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
def test_quantized_rows_come_back_to_within_half_a_step(rows: list[list[float]], dtype: torch.dtype) -> None:
    x = torch.tensor(rows).to(dtype)
    q, scale = dynamic_quant(x)
    assert (scale >= 0).all()
    assert torch.equal(q.abs().amax(-1) == 127, scale > 0), "the largest value of a row uses the whole range"
    back = q.double() * scale.double().unsqueeze(-1)
    assert ((back - x.double()).abs() <= scale.double().unsqueeze(-1) * 0.50001).all()


def test_halves_round_to_even_and_zeros_stay() -> None:
    q, scale = dynamic_quant(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]))
    assert q.tolist() == [[127, 0, 2, 2, 0, -2], [0] * 6]
    assert scale.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("smallest", [1e-40, 1e-44, 1.4e-45])
def test_rows_of_the_smallest_numbers_do_not_overflow(smallest: float) -> None:
    q, _ = dynamic_quant(torch.tensor([[smallest, -smallest, 0.0]]))
    assert q[0, 0] == -q[0, 1] >= 0


def rotated(x: Tensor, positions: Tensor, interleaved: bool, base: float = 1e4) -> Tensor:
    angles = positions.unsqueeze(-1) * base ** -(torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    return rotary(x, angles.cos().float(), angles.sin().float(), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_that_of_transformers(interleaved: bool, generator: torch.Generator) -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    x = torch.randn(6, 4, 32, generator=generator)
    angles = torch.rand(6, 16, generator=generator) * 6
    table = torch.cat((angles, angles), -1)[None]
    apply = modeling.apply_rotary_pos_emb_interleave if interleaved else modeling.apply_rotary_pos_emb
    wanted, _ = apply(x.transpose(0, 1)[None], x.transpose(0, 1)[None], table.cos(), table.sin())
    wanted = wanted[0].transpose(0, 1)
    found = rotary(x, angles.cos(), angles.sin(), interleaved)
    if interleaved:  # there the pairs are left apart in halves, which no product of two rotated vectors can tell
        found = torch.cat((found[..., ::2], found[..., 1::2]), -1)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


@FEW
@given(shift=st.integers(0, 2000), apart=st.integers(0, 2000), interleaved=st.booleans(), seed=st.integers(0, 99))
def test_rotation_keeps_lengths_and_tells_distances_only(shift: int, apart: int, interleaved: bool, seed: int) -> None:
    query, key = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(seed)).unbind()

    def product(at: int) -> Tensor:
        turned = (rotated(x, torch.tensor([p]), interleaved) for x, p in ((query, at + apart), (key, at)))
        return (next(turned) * next(turned)).sum()

    turned = rotated(query, torch.tensor([shift]), interleaved)
    torch.testing.assert_close(turned.norm(), query.norm())
    torch.testing.assert_close(product(0), product(shift), atol=3e-3, rtol=1e-3)


def test_what_is_past_the_rotated_part_is_left_alone(generator: torch.Generator) -> None:
    x = torch.randn(3, 2, 24, generator=generator)
    angles = torch.rand(3, 4, generator=generator)
    y = rotary(x, angles.cos(), angles.sin(), False)
    assert torch.equal(y[..., 8:], x[..., 8:])
    assert torch.equal(y[..., :8], rotary(x[..., :8].contiguous(), angles.cos(), angles.sin(), False))


def test_no_rows_have_no_strides_to_be_wrong() -> None:
    none, weight = torch.empty_strided((0, 8), (0, 0)), torch.ones(8)
    assert rms_norm(none, weight, 1e-6).shape == (0, 8)
    assert [tuple(part.shape) for part in dynamic_quant(none)] == [(0, 8), (0,)]
    assert swiglu(none).shape == (0, 4)
    assert rotary(none.unsqueeze(1), torch.ones(0, 4), torch.ones(0, 4), False).shape == (0, 1, 8)


def test_gate_comes_first(generator: torch.Generator) -> None:
    gate_up = torch.randn(4, 12, generator=generator)
    gate, up = gate_up.double().chunk(2, -1)
    wanted = glu(torch.cat((up, gate), -1), -1) * gate
    torch.testing.assert_close(swiglu(gate_up).double(), wanted, atol=1e-6, rtol=1e-5)
    q, scale = swiglu_quant(gate_up)
    torch.testing.assert_close(q * scale.unsqueeze(-1), wanted.float(), atol=float(scale.max()) * 0.51, rtol=0)


def test_each_row_is_scaled_as_its_expert_and_rows_past_the_last_are_zero(generator: torch.Generator) -> None:
    sizes = [2, 0, 3]
    acc = torch.randint(-9000, 9000, (7, 16), generator=generator, dtype=torch.int32)
    row_scale, column_scale = torch.rand(7, generator=generator) * 0.01, torch.rand(3, 16, generator=generator) * 0.1
    q, scale = dequant_swiglu_quant(acc, row_scale, column_scale, torch.tensor(sizes))
    for row, expert in enumerate([0, 0, 2, 2, 2]):
        wide = acc[row].double() * row_scale[row].double() * column_scale[expert].double()
        wanted = torch.nn.functional.silu(wide[:8]) * wide[8:]
        torch.testing.assert_close(q[row].double() * scale[row], wanted, atol=float(scale[row]) * 0.51, rtol=0)
    assert not q[5:].any()
    assert not scale[5:].any()


X, W = torch.ones(2, 4), torch.ones(4)
SCALES = (torch.ones(3), torch.ones(2, 8), torch.tensor([1, 2]))
ACC = torch.ones(3, 8, dtype=torch.int32)


@pytest.mark.parametrize(
    ("op", "inputs", "argument"),
    [
        pytest.param(rms_norm, (X, torch.ones(3), 1e-6), "weight", id="weight of another size"),
        pytest.param(rms_norm, (X, torch.ones(1, 4), 1e-6), "weight", id="weight of two dimensions"),
        pytest.param(rms_norm, (X, W.bfloat16(), 1e-6), "weight", id="weight of another dtype"),
        pytest.param(rms_norm, (X, W.to("meta"), 1e-6), "weight", id="weight elsewhere"),
        pytest.param(rms_norm, (X, W, 0.0), "eps", id="eps zero"),
        pytest.param(rms_norm, (X, W, float("nan")), "eps", id="eps not a number"),
        pytest.param(rms_norm, (X.double(), W.double(), 1e-6), "x", id="float64"),
        pytest.param(rms_norm, (torch.ones(4, 2).T, W, 1e-6), "x", id="elements apart"),
        pytest.param(rms_norm, (torch.ones(2, 0), torch.ones(0), 1e-6), "x", id="empty rows"),
        pytest.param(rms_norm, (W, W, 1e-6), "x", id="no rows"),
        pytest.param(add_rms_norm, (X, torch.ones(1, 4), W, 1e-6), "residual", id="residual would be broadcast"),
        pytest.param(add_rms_norm_quant, (X, X.half(), W, 1e-6), "residual", id="residual of another dtype"),
        pytest.param(rms_norm_quant, (torch.ones(2, 8)[:, :4], W, 1e-6), "x", id="strided rows"),
        pytest.param(dynamic_quant, (X.int(),), "x", id="integers"),
        pytest.param(swiglu, (torch.ones(2, 5),), "gate_up", id="odd"),
        pytest.param(rotary, (torch.ones(2, 1, 4), torch.ones(2, 3), torch.ones(2, 3), False), "cos", id="R beyond D"),
        pytest.param(rotary, (torch.ones(2, 1, 4), torch.ones(3, 2), torch.ones(3, 2), False), "cos", id="tokens"),
        pytest.param(rotary, (torch.ones(2, 1, 4), torch.ones(2, 2), torch.ones(2, 1), False), "sin", id="sine"),
        pytest.param(dequant_swiglu_quant, (ACC, torch.ones(2), *SCALES[1:]), "row_scale", id="rows"),
        pytest.param(dequant_swiglu_quant, (ACC, SCALES[0], torch.ones(2, 4), SCALES[2]), "column_scale", id="columns"),
        pytest.param(dequant_swiglu_quant, (ACC, *SCALES[:2], SCALES[2].int()), "group_sizes", id="sizes in int32"),
    ],
)
def test_bad_input_is_refused_by_name(op: Callable[..., Any], inputs: tuple[Any, ...], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: "):
        op(*inputs)
