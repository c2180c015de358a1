"""The SwiGLU experts of a layer in one op: permute, two grouped products with the activation between, combine."""

from collections.abc import Iterator

import torch
from torch import Tensor, device
from torch.nn.functional import silu

from omni_kernels.case import DEEPSEEK_V3, QWEN3_MOE, TINY, Case, ModelShape, declare, dtype_name
from omni_kernels.checks import (
    FLOATS,
    has_dims,
    has_dtype,
    has_shape,
    is_contiguous,
    on_device_of,
    refuse,
    wide,
)


def _moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
    """The sum over each token's slots of weight * down(silu(gate(x)) * up(x)): (T, H) in the dtype of x (T, H).

    gate_up (E, 2I, H), gate first, and down (E, H, I) lie as checkpoints store them; weights float32 (T, k) and
    slots int32 (T, k) are as `moe_gate` gives them. Slots outside of 0 .. E - 1 are somebody else's and add nothing.
    Computes in float32 and rounds once; kernels may round what they pass on to the dtype of x.
    """
    total = wide(x).new_zeros(x.shape)
    for slot in range(len(gate_up)):
        token, choice = torch.nonzero(slots == slot, as_tuple=True)
        if len(token) == 0:
            continue
        gate, up = (wide(x[token]) @ wide(gate_up[slot]).T).chunk(2, dim=-1)
        made = (silu(gate) * up) @ wide(down[slot]).T
        total.index_add_(0, token, made * weights[token, choice].unsqueeze(1))
    return total.to(x.dtype)


def _fake(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
    return torch.empty_like(x)


def _check(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, slots: Tensor) -> None:
    has_dims("x", x, 2)
    has_dtype("x", x, *FLOATS)
    is_contiguous("x", x)
    tokens, hidden = x.shape
    has_dtype("gate_up", gate_up, x.dtype)
    has_shape("gate_up", gate_up, (-1, -1, hidden))
    is_contiguous("gate_up", gate_up)
    on_device_of("gate_up", gate_up, x)
    experts, doubled, _ = gate_up.shape
    if 0 in gate_up.shape or doubled % 2:
        refuse("gate_up", "must hold experts of gate and up, of one size each", tuple(gate_up.shape))
    has_dtype("down", down, x.dtype)
    has_shape("down", down, (experts, hidden, doubled // 2))
    is_contiguous("down", down)
    on_device_of("down", down, x)
    has_dtype("slots", slots, torch.int32)
    has_shape("slots", slots, (tokens, -1))
    is_contiguous("slots", slots)
    on_device_of("slots", slots, x)
    if slots.shape[1] == 0:
        refuse("slots", "must name a slot for each token", tuple(slots.shape))
    has_dtype("weights", weights, torch.float32)
    has_shape("weights", weights, slots.shape)
    is_contiguous("weights", weights)
    on_device_of("weights", weights, x)


def _samples(where: device) -> Iterator[Case]:
    generator = torch.Generator(device="cpu").manual_seed(0)

    def case(
        name: str, model: ModelShape, tokens: int, dtype: torch.dtype, experts: int, intermediate: int, first: int = 0
    ) -> Case:
        hidden, top_k = model.hidden, model.top_k
        x = torch.randn(tokens, hidden, generator=generator)
        gate_up = torch.randn(experts, 2 * intermediate, hidden, generator=generator).div_(hidden**0.5)
        down = torch.randn(experts, hidden, intermediate, generator=generator).div_(intermediate**0.5)
        weights = torch.rand(tokens, top_k, generator=generator).to(where)
        order = torch.rand(tokens, max(experts, top_k), generator=generator).argsort(-1)
        slots = (order[:, :top_k].int() - first).to(where)
        inputs = (x.to(where, dtype), gate_up.to(where, dtype), down.to(where, dtype), weights, slots)
        tolerance = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (2e-2, 1.6e-2), torch.float16: (2e-3, 2e-3)}[dtype]
        return Case(f"moe_experts-{model.name}-{name}", inputs, *tolerance)

    # Big models with a part of their experts, and of the size of each.
    for dtype in (torch.float32, torch.bfloat16):
        name = dtype_name(dtype)
        yield case(name, TINY, 9, dtype, TINY.experts, TINY.intermediate)
        yield case(name, QWEN3_MOE, 3, dtype, 10, 64)
        yield case(name, DEEPSEEK_V3, 2, dtype, 9, 32)
    yield case("many-rows", TINY, 70, torch.bfloat16, TINY.experts, TINY.intermediate)
    yield case("float16", TINY, 3, torch.float16, TINY.experts, TINY.intermediate)
    yield case("rank-of-two", TINY, 5, torch.bfloat16, TINY.experts // 2, TINY.intermediate, 2)
    yield case("nothing-local", TINY, 2, torch.bfloat16, TINY.experts, TINY.intermediate, 50)
    yield case("no-token", TINY, 0, torch.float32, TINY.experts, TINY.intermediate)


MOE_EXPERTS = declare("moe_experts", _moe_experts, _fake, _check, _samples)
moe_experts = MOE_EXPERTS.call

OPS = (MOE_EXPERTS,)
