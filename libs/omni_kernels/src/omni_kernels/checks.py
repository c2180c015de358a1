"""Validators of arguments. Each raises ValueError("<argument>: <what is expected>, not <what came>")."""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from omni_kernels.case import dtype_name

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype that meanings compute in: float32, or float64 where it is float64 already."""
    return x if x.dtype is torch.float64 else x.float()


def refuse(argument: str, expected: str, came: object) -> NoReturn:
    """Always raises ValueError."""
    raise ValueError(f"{argument}: {expected}, not {came}")


class Unsupported(ValueError):
    """An argument that the op takes and the kernel of a backend does not; the message starts with its name."""


def unsupported(argument: str, expected: str, came: object) -> NoReturn:
    """Always raises Unsupported."""
    raise Unsupported(f"{argument}: {expected}, not {came}")


def has_dtype(argument: str, x: Tensor, *dtypes: torch.dtype) -> None:
    if x.dtype not in dtypes:
        refuse(argument, f"dtype must be {' or '.join(map(dtype_name, dtypes))}", dtype_name(x.dtype))


def has_dims(argument: str, x: Tensor, dims: int) -> None:
    if x.ndim != dims:
        refuse(argument, f"must have {dims} dimensions", tuple(x.shape))


def has_shape(argument: str, x: Tensor, shape: Sequence[int]) -> None:
    """-1 in `shape` stands for any size."""
    if x.shape == shape:
        return
    if x.ndim != len(shape) or any(want not in (-1, size) for want, size in zip(shape, x.shape, strict=True)):
        wanted = ", ".join("any" if size == -1 else str(size) for size in shape)
        refuse(argument, f"shape must be ({wanted})", tuple(x.shape))


def is_contiguous(argument: str, x: Tensor) -> None:
    if not x.is_contiguous():
        refuse(argument, "must be contiguous", f"strides {x.stride()} of shape {tuple(x.shape)}")


def has_unit_stride(argument: str, x: Tensor) -> None:
    """Rows may be strided, elements of the last dimension may not; there is at least one of them."""
    if x.ndim == 0 or x.shape[-1] == 0:
        refuse(argument, "last dimension must not be empty", tuple(x.shape))
    if x.stride(-1) != 1 and x.numel():
        refuse(argument, "elements of the last dimension must lie next to each other", f"strides {x.stride()}")


def has_rows(argument: str, x: Tensor) -> None:
    """Two dimensions or more; rows may be strided, their elements lie next to each other, at least one of them."""
    if x.ndim < 2:
        refuse(argument, "must have rows: two dimensions or more", tuple(x.shape))
    has_unit_stride(argument, x)


def on_device_of(argument: str, x: Tensor, other: Tensor) -> None:
    if x.device != other.device:
        refuse(argument, f"must be on {other.device}", x.device)


def is_positive(argument: str, value: float) -> None:
    if not value > 0:
        refuse(argument, "must be positive", value)


def in_range(argument: str, value: float, low: float, high: float) -> None:
    """`low` and `high` included."""
    if not low <= value <= high:
        refuse(argument, f"must be from {low} to {high}", value)


def is_one_of(argument: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        refuse(argument, f"must be one of {', '.join(map(repr, allowed))}", repr(value))
