"""Gated activation of the expert MLPs (Shazeer, 2020)."""

from collections.abc import Iterator

import torch
from torch import Tensor, device
from torch.nn.functional import silu

from omni_kernels.case import MODEL_SHAPES, Case, Op


@torch.library.custom_op("omni::swiglu", mutates_args=())
def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where `gate_up` (..., 2 * intermediate) holds gate and then up.

    Computes in float32; the result (..., intermediate) has the dtype of `gate_up`.
    Raises ValueError when the last dimension is odd.
    """
    _check(gate_up)
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (silu(gate) * up).to(gate_up.dtype)


@swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    _check(gate_up)
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _check(gate_up: Tensor) -> None:
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: last dimension must be even, not {gate_up.shape[-1]}")


def _samples(where: device) -> Iterator[Case]:
    generator = torch.Generator(device="cpu").manual_seed(0)
    for model, _, intermediate in MODEL_SHAPES:
        for dtype, atol, rtol in ((torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-2, 1.6e-2)):
            gate_up = torch.randn(7, 2 * intermediate, generator=generator).to(where, dtype)
            yield Case(f"swiglu-{model}-{str(dtype).removeprefix('torch.')}", (gate_up,), atol, rtol)


OP = Op("swiglu", swiglu, _samples)
