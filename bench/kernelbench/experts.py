"""The experts of a layer, from routed tokens to their sum: our chain of ops beside vLLM's one CPU kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops

from kernelbench.inputs import normal
from omni_kernels.case import ModelShape
from omni_kernels.ops import OPS
from omni_kernels.vllm.bound import bound

EXPERTS = 16
"""Of the model's; more would measure memory only, for all alike."""


def contenders(shape: ModelShape, tokens: int) -> dict[str, Callable[[], Any]]:
    """The same layer of `EXPERTS` experts three ways: omni, vllm, torch (a loop over experts)."""
    x, top_k = normal(tokens, shape.hidden), min(shape.top_k, 2)
    w13 = normal(EXPERTS, 2 * shape.intermediate, shape.hidden) / shape.hidden**0.5
    w2 = normal(EXPERTS, shape.hidden, shape.intermediate) / shape.intermediate**0.5
    chosen = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(1)).topk(top_k)
    weights, ids = chosen.values.softmax(-1), chosen.indices.int()
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    packed13, packed2 = ops.cpu_prepack_moe_weight(w13, isa), ops.cpu_prepack_moe_weight(w2, isa)
    out = torch.empty_like(x)
    permute, multiply, swiglu, combine = (
        bound(OPS[name]) for name in ("moe_permute", "grouped_matmul", "swiglu", "moe_combine")
    )

    def omni() -> Tensor:
        rows, source, sizes = permute(x, ids, EXPERTS)
        hidden = swiglu(multiply(rows, w13.transpose(1, 2), sizes))
        combined: Tensor = combine(multiply(hidden, w2.transpose(1, 2), sizes), source, weights, None)
        return combined

    def vllm() -> None:
        ops.cpu_fused_moe(out, x, packed13, packed2, None, None, weights, ids, "silu", isa, False)

    def loop() -> Tensor:
        total = torch.zeros(x.shape)
        for expert in range(EXPERTS):
            token, choice = torch.where(ids == expert)
            gate, up = torch.nn.functional.linear(x[token], w13[expert]).chunk(2, -1)
            down = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, w2[expert])
            total.index_add_(0, token, down.float() * weights[token, choice].unsqueeze(1))
        return total.to(x.dtype)

    return {"omni": omni, "vllm": vllm, "torch": loop}
