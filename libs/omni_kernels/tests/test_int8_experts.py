"""Experts on int8 weights against the same experts in float64 on the weights as they were."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from omni_kernels.ops.quant import quantized
from omni_kernels.quantize.int8_experts import int8_experts

EXPERTS, HIDDEN, INNER = 6, 96, 48


def reference(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, (share, chosen) in enumerate(zip(weights.double(), experts.tolist(), strict=True)):
        for amount, expert in zip(share, chosen, strict=True):
            gate, up = (w13[expert].double() @ x[token].double()).chunk(2)
            out[token] += amount * (w2[expert].double() @ (silu(gate) * up))
    return out


@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_are_as_good_as_eight_bits(tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    w13 = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator) / HIDDEN**0.5
    w2 = torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) / INNER**0.5
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    experts = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=generator)
    (q13, s13), (q2, s2) = quantized(w13), quantized(w2)
    for indices in (experts, experts.int()):
        found = int8_experts(x, q13, s13, q2, s2, weights, indices)
        assert found.dtype == dtype
        wanted = reference(x, w13, w2, weights, experts)
        assert float((found.double() - wanted).norm() / wanted.norm()) < 0.03
