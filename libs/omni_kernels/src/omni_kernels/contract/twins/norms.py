"""Root-mean-square normalisation and dynamic quantization as torch_npu documents them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omni_kernels.contract.twins.documented import FLOATS, GARBAGE, HALVES, refuse_given, require, require_dtype


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(y, rstd): y = x * rstd * gamma, rstd = 1 / sqrt(mean(x^2) + epsilon) in float32 over the dims of gamma."""
    require_dtype("input", input, *FLOATS)
    require_dtype("gamma", gamma, input.dtype)
    require(input.shape[input.ndim - gamma.ndim :] == gamma.shape, "gamma: not the last dimensions of input")
    dims = tuple(range(input.ndim - gamma.ndim, input.ndim))
    rstd = input.float().pow(2).mean(dims, keepdim=True).add(epsilon).pow(-0.5)
    return (input.float() * rstd * gamma.float()).to(input.dtype), rstd


def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """(y, rstd, x): x = x1 + x2, then npu_rms_norm of x."""
    require_dtype("x2", x2, x1.dtype)
    require(x1.shape == x2.shape, "x2: not of the shape of x1")
    x = x1 + x2
    y, rstd = npu_rms_norm(x, gamma, epsilon)
    return y, rstd, x


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(int8, float32 scale) of each row of float32 `rows`: scale = max|row| / 127, round(row / scale).

    What a row of zeros gives is not documented; it is taken to be 0 with scale 0.
    """
    scale = rows.abs().amax(-1, keepdim=True) / 127
    return (rows / scale).nan_to_num(0.0).round().to(torch.int8), scale.squeeze(-1)


def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: torch.dtype | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(int8, scale float32) for each row, symmetric; at least two dimensions, half precision only."""
    refuse_given(smooth_scales=smooth_scales, group_index=group_index)
    require(dst_type in (None, torch.int8, 1) and quant_mode == "pertoken", "dst_type, quant_mode: not modelled")
    require_dtype("input", input, *HALVES)
    require(input.ndim > 1, "input: must have more than one dimension")
    return quantized(input.float())


def npu_add_rms_norm_dynamic_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    *,
    smooth_scale1: Tensor | None = None,
    smooth_scale2: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-6,
    output_mask: Sequence[bool] = (),
    y_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y1, undefined, x1 + x2, scale1, undefined) of the norm in float32; one path only.

    Whether the norm sees the sum as it is or rounded to the dtype of x1 is not documented; here it is not rounded.
    """
    refuse_given(smooth_scale1=smooth_scale1, smooth_scale2=smooth_scale2, beta=beta)
    require(not output_mask or list(output_mask) == [True, False], "output_mask: not modelled")
    require(y_dtype in (None, torch.int8), "y_dtype: not modelled")
    require_dtype("x1", x1, *HALVES)
    require_dtype("gamma", gamma, x1.dtype)
    require(x1.numel() > 0, "x1: empty tensors are not supported")
    require(x1.ndim > 1, "x1: must have 2 to 8 dimensions")
    wide = x1.float() + x2.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * gamma.float()
    q, scale = quantized(normed)
    return q, torch.full_like(q[:1].flatten()[:1], GARBAGE), wide.to(x1.dtype), scale, torch.full((1,), torch.nan)


TWINS: Mapping[str, Callable[..., Any]] = {
    "npu_rms_norm": npu_rms_norm,
    "npu_add_rms_norm": npu_add_rms_norm,
    "npu_dynamic_quant": npu_dynamic_quant,
    "npu_add_rms_norm_dynamic_quant": npu_add_rms_norm_dynamic_quant,
}
