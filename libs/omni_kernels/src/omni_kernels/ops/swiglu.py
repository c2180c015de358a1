"""Gated activation of MLPs and experts (Shazeer, 2020), alone, and between int8 matrix products."""

from collections.abc import Iterator

import torch
from torch import Tensor, device
from torch.nn.functional import silu

from omni_kernels.case import MODELS, TINY, TOLERANCE, Case, declare, dtype_name
from omni_kernels.checks import (
    FLOATS,
    has_dims,
    has_dtype,
    has_rows,
    has_shape,
    is_contiguous,
    on_device_of,
    refuse,
    wide,
)
from omni_kernels.ops.quant import fake_quant, quantized


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def _swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where `gate_up` (..., 2 * I) holds gate and then up.

    Computes in float32; the result (..., I) has the dtype of `gate_up`.
    Raises ValueError when the last dimension is odd.
    """
    return _gated(wide(gate_up)).to(gate_up.dtype)


def _swiglu_quant(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """dynamic_quant of the float32 swiglu of `gate_up` (..., 2 * I): (int8 (..., I), scale float32 (...)).

    Raises ValueError when the last dimension is odd.
    """
    return quantized(_gated(wide(gate_up)))


def _dequant_swiglu_quant(
    acc: Tensor, row_scale: Tensor, column_scale: Tensor, group_sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """What stands between the two int8 matrix products of experts: (int8 (T, I), scale float32 (T,)).

    `acc` int32 (T, 2 * I) is the first product, its rows ordered by expert, `group_sizes` int64 (E,) of them each;
    acc * row_scale (T,) * column_scale (E, 2 * I) of the row's expert, both float32, is gate and up of swiglu, whose
    result is quantized as dynamic_quant does. Rows past the sum of `group_sizes` give 0 with scale 0.
    Raises ValueError when sizes or dtypes do not match.
    """
    ends = group_sizes.cumsum(0)
    rows = torch.arange(acc.shape[0], device=acc.device)
    expert = torch.searchsorted(ends, rows, right=True)
    scale = column_scale[expert.clamp(max=group_sizes.shape[0] - 1)] * row_scale.unsqueeze(-1)
    gate_up = acc.to(scale.dtype) * scale
    return quantized(_gated(gate_up).where((rows < ends[-1]).unsqueeze(-1), 0))


def _check(gate_up: Tensor) -> None:
    has_dtype("gate_up", gate_up, *FLOATS)
    _check_halves("gate_up", gate_up)


def _check_halves(argument: str, x: Tensor) -> None:
    has_rows(argument, x)
    if x.shape[-1] % 2:
        refuse(argument, "last dimension must be even", x.shape[-1])
    is_contiguous(argument, x)


def _check_dequant(acc: Tensor, row_scale: Tensor, column_scale: Tensor, group_sizes: Tensor) -> None:
    has_dtype("acc", acc, torch.int32)
    has_dims("acc", acc, 2)
    _check_halves("acc", acc)
    has_dtype("group_sizes", group_sizes, torch.int64)
    has_dims("group_sizes", group_sizes, 1)
    if not group_sizes.shape[0]:
        refuse("group_sizes", "must name at least one expert", tuple(group_sizes.shape))
    scales = (
        ("row_scale", row_scale, acc.shape[:1]),
        ("column_scale", column_scale, (group_sizes.shape[0], acc.shape[1])),
    )
    for argument, scale, shape in scales:
        has_dtype(argument, scale, torch.float32)
        has_shape(argument, scale, shape)
        is_contiguous(argument, scale)
        on_device_of(argument, scale, acc)
    is_contiguous("group_sizes", group_sizes)
    on_device_of("group_sizes", group_sizes, acc)


def _halved(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _fake_quant(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return fake_quant(_halved(gate_up))


def _fake_dequant(acc: Tensor, row_scale: Tensor, column_scale: Tensor, group_sizes: Tensor) -> tuple[Tensor, Tensor]:
    return fake_quant(_halved(acc))


def _gate_ups(where: device) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[str, tuple[int, ...]]] = [(model.name, (7, 2 * model.intermediate)) for model in MODELS]
    shapes += [("one row", (1, 64)), ("no rows", (0, 64)), ("batched", (2, 3, 64)), ("odd half", (2, 2 * 77))]
    for dtype in FLOATS:
        for label, shape in shapes:
            yield f"{label}-{dtype_name(dtype)}", torch.randn(shape, generator=generator).to(where, dtype)


def _samples(where: device) -> Iterator[Case]:
    for label, gate_up in _gate_ups(where):
        yield Case(f"swiglu-{label}", (gate_up,), *TOLERANCE[gate_up.dtype])


def _samples_quant(where: device) -> Iterator[Case]:
    for label, gate_up in _gate_ups(where):
        yield Case(f"swiglu_quant-{label}", (gate_up,), 1e-7, 1e-5, loose=(0,))
    generator = torch.Generator().manual_seed(1)
    for dtype in FLOATS:  # rows so wide that a kernel may round them to their dtype before it quantizes
        gate_up = torch.randn(2, 2 * 18432, generator=generator).to(where, dtype)
        name = f"swiglu_quant-dense layer of deepseek-v3-{dtype_name(dtype)}"
        yield Case(name, (gate_up,), 1e-7, TOLERANCE[dtype][1], loose=(0,), loose_share=0.2)


def _samples_dequant(where: device) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    groups: list[tuple[str, tuple[int, ...], int, int]]
    groups = [(model.name, (3, 0, 1, 5), 9, model.intermediate) for model in MODELS]
    groups += [("one row", (0, 1), 1, 64), ("no rows", (0, 0), 0, 64), ("rows past the groups", (2, 3), 8, TINY.hidden)]
    groups += [("odd half", (4,), 4, 77)]
    for label, sizes, rows, intermediate in groups:
        acc = torch.randint(-40000, 40000, (rows, 2 * intermediate), generator=generator, dtype=torch.int32)
        row_scale = torch.rand(rows, generator=generator) * 0.01
        column_scale = torch.rand(len(sizes), 2 * intermediate, generator=generator) * 0.01
        inputs = tuple(tensor.to(where) for tensor in (acc, row_scale, column_scale, torch.tensor(sizes)))
        yield Case(f"dequant_swiglu_quant-{label}-int32", inputs, 1e-7, 1e-5, loose=(0,))


SWIGLU = declare("swiglu", _swiglu, _halved, _check, _samples)
SWIGLU_QUANT = declare("swiglu_quant", _swiglu_quant, _fake_quant, _check, _samples_quant)
DEQUANT_SWIGLU_QUANT = declare(
    "dequant_swiglu_quant", _dequant_swiglu_quant, _fake_dequant, _check_dequant, _samples_dequant
)
swiglu = SWIGLU.call
swiglu_quant = SWIGLU_QUANT.call
dequant_swiglu_quant = DEQUANT_SWIGLU_QUANT.call

OPS = (SWIGLU, SWIGLU_QUANT, DEQUANT_SWIGLU_QUANT)
