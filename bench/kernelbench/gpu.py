"""What a GPU is timed with: events around calls, its caches cleared before each; and its own limits, measured."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from kernelbench.roofline import Roof

_CLEARED_BYTES = 256 << 20
"""More than the caches of any GPU hold."""
_COPIED_BYTES = 1 << 30
_SIDE = 8192


def median_s(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds on the GPU from the first kernel of a call to its last.

    Clearing the caches takes longer than a launch, so the call's kernels are queued by the time they may start. A call
    that waits for the GPU in between is timed with its waits.
    """
    scratch = torch.empty(_CLEARED_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        run()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for began, ended in pairs:
        scratch.zero_()
        began.record()
        run()
        ended.record()
    torch.cuda.synchronize()
    return statistics.median(began.elapsed_time(ended) for began, ended in pairs) / 1e3


def measure_roof(repeats: int) -> Roof:
    """Bytes/s of a copy of 1 GiB, and operations/s of torch's products of 8192 x 8192 matrices."""
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_s = median_s(lambda: target.copy_(source), repeats)
    operations = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
        a = torch.randint(-8, 8, (_SIDE, _SIDE), device="cuda").to(dtype)
        b = a.t()
        product = torch._int_mm if dtype is torch.int8 else torch.matmul
        operations[dtype] = 2 * _SIDE**3 / median_s(lambda a=a, b=b, product=product: product(a, b), repeats)  # type: ignore[misc]
    return Roof(2 * _COPIED_BYTES / copy_s, operations)
