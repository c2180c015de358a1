"""Gated activations, rotation and sampling filters as torch_npu documents them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from omni_kernels.contract.twins.documented import FLOATS, GARBAGE, refuse_given, require, require_dtype
from omni_kernels.contract.twins.norms import quantized


def _swish(x: Tensor) -> Tensor:
    return torch.mul(x, torch.sigmoid(x))


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """swish(first half) * second half along `dim`."""
    require_dtype("input", input, *FLOATS)
    require(input.shape[dim] % 2 == 0, "input: the split dimension is odd")
    gate, up = input.float().chunk(2, dim)
    return (_swish(gate) * up).to(input.dtype)


def npu_swiglu_quant(
    x: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    offsets: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    group_list_type: int = 0,
    dst_type: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(int8, scale) of swiglu; the right half is activated unless `activate_left`. Dynamic quantization only."""
    refuse_given(smooth_scales=smooth_scales, offsets=offsets, group_index=group_index)
    require(quant_mode == 1, "quant_mode: static quantization is not modelled")
    require(dst_type in (None, torch.int8), "dst_type: not modelled")
    require_dtype("x", x, *FLOATS)
    require(x.ndim > 1 and x.shape[-1] % 2 == 0 and x.shape[-1] <= 8192, "x: last dimension odd or beyond 8192")
    left, right = x.float().chunk(2, -1)
    return quantized(_swish(left) * right if activate_left else _swish(right) * left)


def npu_dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(int8, scale) of swiglu of the dequantized int32 `x`; rows past the groups are left as they were in memory."""
    refuse_given(bias=bias, quant_scale=quant_scale, quant_offset=quant_offset)
    require_dtype("x", x, torch.int32)
    require(weight_scale is not None and activation_scale is not None, "an int32 x needs both scales")
    assert weight_scale is not None and activation_scale is not None
    require(quant_mode == 1 and swiglu_mode == 0, "quant_mode, swiglu_mode: not modelled")
    require_dtype("weight_scale", weight_scale, torch.float32)
    require_dtype("activation_scale", activation_scale, torch.float32)
    require(x.ndim == 2 and x.shape[1] % 2 == 0, "x: must have two dimensions, the last one even")
    require(x.shape[1] // 2 <= 10496 and x.shape[1] // 2 % 64 == 0, "x: half of the last dimension in 64s up to 10496")
    counts = [len(x)] if group_index is None else group_index.tolist()
    if group_index is not None:
        require_dtype("group_index", group_index, torch.int64)
    require(weight_scale.shape == (len(counts), x.shape[1]), "weight_scale: must be (groups, 2H)")
    require(sum(counts) <= len(x) and min(counts, default=0) >= 0, "group_index: more rows than x has")
    q = x.new_full((len(x), x.shape[1] // 2), GARBAGE, dtype=torch.int8)
    scale = torch.full((len(x),), torch.nan)
    start = 0
    for group, count in enumerate(counts):
        rows = slice(start, start + count)
        left, right = (x[rows].float() * weight_scale[group] * activation_scale[rows, None]).chunk(2, -1)
        gated = _swish(left) * right if activate_left else _swish(right) * left
        if count:
            q[rows], scale[rows] = quantized(gated)
        start += count
    return q, scale


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """r1 * x + r2 * x', x' = (-second, first) of halves, or of each pair where `interleave`. r1, r2 broadcast."""
    refuse_given(rotate=rotate)
    for name, x in (("input", input), ("r1", r1), ("r2", r2)):
        require_dtype(name, x, input.dtype)
        require_dtype(name, x, *FLOATS)
        require(x.ndim == 4, f"{name}: must have four dimensions")
    size = input.shape[-1]
    require(size % 2 == 0 and size < 896 and r1.shape[-1] == size and r2.shape == r1.shape, "sizes are not documented")
    require(rotary_mode in ("half", "interleave"), "rotary_mode: half or interleave")
    same = [left == right for left, right in zip(input.shape, r1.shape, strict=True)]
    require(all(s or n == 1 for s, n in zip(same, r1.shape, strict=True)), "r1: does not broadcast to input")
    wide = input.float()
    if rotary_mode == "half":
        first, second = wide.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    else:
        turned = torch.stack((-wide[..., 1::2], wide[..., ::2]), -1).flatten(-2)
    return (r1.float() * wide + r2.float() * turned).to(input.dtype)


def npu_top_k_top_p(logits: Tensor, p: Tensor | None = None, k: Tensor | None = None) -> Tensor:
    """Sorted ascending, below the k-th largest is dropped, then what lies in the lowest 1 - p of the probability."""
    require_dtype("logits", logits, *FLOATS)
    require(logits.ndim == 2 and (p is not None or k is not None), "logits: two dimensions; one of p and k")
    ordered, order = logits.sort(dim=-1, descending=False, stable=True)
    if k is not None:
        require_dtype("k", k, torch.int32)
        require(bool(((k >= 1) & (k <= min(1024, logits.shape[1]))).all()), "k: must be from 1 to 1024 and to the size")
        edge = ordered.gather(1, (logits.shape[1] - k.long()).unsqueeze(1))
        ordered = ordered.masked_fill(ordered < edge, float("-inf"))
    if p is not None:
        require_dtype("p", p, logits.dtype)
        require(bool(((p >= 0) & (p <= 1)).all()), "p: must be from 0 to 1")
        dropped = ordered.softmax(-1).cumsum(-1) <= 1 - p.unsqueeze(1)
        dropped[:, -1] = False
        ordered = ordered.masked_fill(dropped, float("-inf"))
    return torch.empty_like(logits).scatter_(1, order, ordered)


TWINS: Mapping[str, Callable[..., Any]] = {
    "npu_swiglu": npu_swiglu,
    "npu_swiglu_quant": npu_swiglu_quant,
    "npu_dequant_swiglu_quant": npu_dequant_swiglu_quant,
    "npu_rotary_mul": npu_rotary_mul,
    "npu_top_k_top_p": npu_top_k_top_p,
}
