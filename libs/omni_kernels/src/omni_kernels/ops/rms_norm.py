"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

from collections.abc import Iterator

import torch
from torch import Tensor, device

from omni_kernels.case import MODEL_SHAPES, Case, Op


@torch.library.custom_op("omni::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each row of `x` (..., hidden) to unit root-mean-square, then by `weight` (hidden,).

    Computes in float32; the result has the dtype of `x`.
    Raises ValueError when `weight` does not match the last dimension of `x`, or `eps` is not positive.
    """
    _check(x, weight, eps)
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check(x, weight, eps)
    return torch.empty_like(x)


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    if weight.ndim != 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"weight: shape {tuple(weight.shape)} does not match the last dimension of x, {x.shape[-1]}")
    if eps <= 0:
        raise ValueError(f"eps: must be positive, not {eps}")


def _samples(where: device) -> Iterator[Case]:
    generator = torch.Generator(device="cpu").manual_seed(0)
    for model, hidden, _ in MODEL_SHAPES:
        for dtype, atol, rtol in ((torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-2, 1.6e-2)):
            x = torch.randn(7, hidden, generator=generator).to(where, dtype)
            weight = torch.rand(hidden, generator=generator).to(where, dtype)
            yield Case(f"rms_norm-{model}-{str(dtype).removeprefix('torch.')}", (x, weight, 1e-6), atol, rtol)


OP = Op("rms_norm", rms_norm, _samples)
