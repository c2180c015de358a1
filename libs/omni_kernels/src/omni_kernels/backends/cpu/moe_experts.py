"""Experts on the CPU: groups of few rows in a compiled loop that reads each weight once, others through oneDNN."""

from collections.abc import Callable, Mapping
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from omni_kernels.backends.cpu import swiglu
from omni_kernels.backends.cpu.compiled import pointer
from omni_kernels.backends.cpu.grouped_matmul import dot, few_rows
from omni_kernels.backends.cpu.moe_permute import combine, permute
from omni_kernels.backends.cpu.rows import exponential, load, loop, store
from omni_kernels.ops.grouped_matmul import groups

_FLOAT, _HALF, _LONG = np.float32, np.uint16, np.int64
_SWIGLU = swiglu.KERNELS["swiglu"]


@loop
def _few_rows(
    x_at: int, gate_up_at: int, down_at: int, sizes_at: int, y_at: int, shape: tuple[int, int, int], most: int
) -> None:
    """The experts that have up to `most` rows, in bfloat16. `shape`: E, H, I."""
    experts, hidden, inner = shape
    gate_up = numba.carray(pointer(gate_up_at, _HALF), (experts, 2 * inner, hidden))
    down = numba.carray(pointer(down_at, _HALF), (experts, hidden, inner))
    sizes = numba.carray(pointer(sizes_at, _LONG), (experts,))
    x = np.empty((most, hidden), _FLOAT)
    y = np.empty((most, hidden), _FLOAT)
    activated = np.empty((most, inner), _FLOAT)
    start = 0
    for expert in range(experts):
        size = sizes[expert]
        if 0 < size <= most:
            for row in range(size):
                load(x_at + 2 * hidden * (start + row), x[row], True)
            for i in range(inner):
                for row in range(size):
                    gate = dot(x[row], gate_up[expert, i])
                    up = dot(x[row], gate_up[expert, inner + i])
                    activated[row, i] = gate / (_FLOAT(1) + exponential(-gate)) * up
            for column in range(hidden):
                for row in range(size):
                    y[row, column] = dot(activated[row], down[expert, column])
            for row in range(size):
                store(y[row], y_at + 2 * hidden * (start + row), True)
        start += size


def _moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
    experts, doubled, hidden = gate_up.shape
    inner = doubled // 2
    rows, source, sizes = permute(x, slots, experts)
    made = torch.empty_like(rows)
    most = few_rows(x.dtype, hidden, inner)
    has_few, end = False, 0
    for expert, span in groups(rows, sizes):
        if span.stop - span.start <= most:
            has_few = True
        else:
            activated = _SWIGLU(torch.mm(rows[span], gate_up[expert].t()))
            torch.mm(activated, down[expert].t(), out=made[span])
        end = span.stop
    if has_few:
        addresses = (rows.data_ptr(), gate_up.data_ptr(), down.data_ptr(), sizes.data_ptr(), made.data_ptr())
        _few_rows(*addresses, (experts, hidden, inner), most)
    made[end:] = 0
    return combine(made, source, weights, None)


KERNELS: Mapping[str, Callable[..., Any]] = {"moe_experts": _moe_experts}
