"""Rotary position embedding as one compiled loop over tokens and heads."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni_kernels.backends.cpu.rows import FLOAT, KNOWN, load, loop, store
from omni_kernels.ops.rotary import ROTARY


@loop
def _rotate(
    x_at: int,
    token_stride: int,
    head_stride: int,
    cos_at: int,
    sin_at: int,
    y_at: int,
    tokens: int,
    heads: int,
    columns: int,
    half: int,
    interleaved: bool,
    is_half: bool,
    table_is_half: bool,
) -> None:
    """Strides of `x` are in elements; `half` is the number of angles of a token."""
    size, table_size = 2 if is_half else 4, 2 if table_is_half else 4
    cos, sin = np.empty(half, FLOAT), np.empty(half, FLOAT)
    row, turned = np.empty(columns, FLOAT), np.empty(columns, FLOAT)
    for token in range(tokens):
        load(cos_at + token * half * table_size, cos, table_is_half)
        load(sin_at + token * half * table_size, sin, table_is_half)
        for head in range(heads):
            load(x_at + (token * token_stride + head * head_stride) * size, row, is_half)
            if interleaved:
                for i in range(half):
                    turned[2 * i] = row[2 * i] * cos[i] - row[2 * i + 1] * sin[i]
                    turned[2 * i + 1] = row[2 * i + 1] * cos[i] + row[2 * i] * sin[i]
            else:
                for i in range(half):
                    turned[i] = row[i] * cos[i] - row[half + i] * sin[i]
                    turned[half + i] = row[half + i] * cos[i] + row[i] * sin[i]
            for i in range(2 * half, columns):
                turned[i] = row[i]
            store(turned, y_at + (token * heads + head) * columns * size, is_half)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    if x.dtype not in KNOWN:
        return ROTARY.meaning(x, cos, sin, interleaved)
    y = x.new_empty(x.shape)
    tokens, heads, columns = x.shape
    _rotate(
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        cos.data_ptr(),
        sin.data_ptr(),
        y.data_ptr(),
        tokens,
        heads,
        columns,
        cos.shape[1],
        interleaved,
        x.dtype is torch.bfloat16,
        cos.dtype is torch.bfloat16,
    )
    return y


KERNELS: Mapping[str, Callable[..., Any]] = {"rotary": _rotary}
