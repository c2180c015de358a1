"""Rotary position embedding on Ascend."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch_npu
from torch import Tensor


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Computes in the dtype of `cos`: a float32 table costs two casts, one of the dtype of `x` costs precision."""
    half = cos.shape[-1]
    rotated, kept = x[..., : 2 * half], x[..., 2 * half :]
    if x.shape[0] == 0:
        return x.clone(memory_format=torch.contiguous_format)
    # One sequence of tokens (1, T, heads, R): the layout BSND with its table 1S1D, which both modes take.
    sequence = rotated.to(cos.dtype).contiguous().unsqueeze(0)
    turned = torch_npu.npu_rotary_mul(
        sequence, _spread(cos, interleaved), _spread(sin, interleaved), "interleave" if interleaved else "half"
    )
    return torch.cat((turned.squeeze(0).to(x.dtype), kept), dim=-1)


def _spread(table: Tensor, interleaved: bool) -> Tensor:
    """(T, R / 2) to (1, T, 1, R): each angle at both elements of its pair."""
    whole = table.repeat_interleave(2, dim=-1) if interleaved else torch.cat((table, table), dim=-1)
    return whole[None, :, None]


KERNELS: Mapping[str, Callable[..., Any]] = {"rotary": _rotary}
