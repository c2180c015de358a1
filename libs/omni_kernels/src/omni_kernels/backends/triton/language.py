"""What the Triton kernels share: products and roundings the interpreter gets right too, and sizes of launches.

Written for Triton 3.2, the version triton-ascend is made from, and later: no tensor descriptors, no gathers or sorts
inside a kernel, no autotuning.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
MAX_PROGRAMS = 65535
"""Of one launch on Ascend; kernels over rows stride over the rest."""


@triton.jit
def dot(a, b, acc):
    """`acc` + a @ b, accumulated in float32 (int32 for integers), float32 operands at full precision.

    The interpreter multiplies bfloat16 as if its bits were integers, so operands are widened there; sums of int8
    products stay exact in float32 up to an inner size of 1024.
    """
    if INTERPRETED:
        total = acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee").to(acc.dtype)
    else:
        total = tl.dot(a, b, acc, input_precision="ieee")
    return total


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 `x` in `dtype`, rounded half to even; the interpreter's own cast to bfloat16 cuts off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        result = tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def nearest(x):
    """Float32 `x`, |x| < 2^22, rounded to whole numbers, half to even: 1.5 * 2^23 leaves no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def first_max(x, index, axis: tl.constexpr):
    """The largest of `x` along `axis` and its `index` there, the lowest of those equal."""
    best = tl.max(x, axis=axis, keep_dims=True)
    at = tl.min(tl.where(x == best, index, 0x7FFFFFFF), axis=axis, keep_dims=True)
    return best, at


INTERPRETED = tl.constexpr(not isinstance(dot, triton.JITFunction))


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that holds `size`, at least `least`."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def programs(count: int) -> tuple[int]:
    """Grid of a kernel that strides over `count` rows."""
    return (min(count, MAX_PROGRAMS),)


def warps(block: int) -> int:
    """Warps for one row of `block` elements: up to 16 elements a thread."""
    return min(max(block // 512, 1), 16)


def on(device: torch.device, *tables: Tensor) -> list[Tensor]:
    """Contiguous and on `device`: block tables may be views, lengths may lie on the host."""
    return [table.to(device, non_blocking=True).contiguous() for table in tables]


def cores(device: torch.device) -> int:
    """Processors that run programs side by side on `device`; a few in the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 24 if device.type == "npu" else 8
