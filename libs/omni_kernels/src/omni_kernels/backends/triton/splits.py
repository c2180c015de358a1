"""Attention over keys split among programs (flash-decoding, Dao et al., 2023): the parts, and one softmax of them."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from omni_kernels.backends.triton.language import cores, narrow, power_of_two, programs

_MAX_SPLITS = 32
_MIN_KEYS = 256  # fewer keys a split are not worth its merge


@triton.jit
def _merge(parts, peaks, sums, out, rows, DV: tl.constexpr, SPLITS: tl.constexpr, DV_BLOCK: tl.constexpr):
    """One softmax from the sums over its splits. parts float32 (rows, splits, dv)."""
    dv = tl.arange(0, DV_BLOCK)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        part = row * SPLITS + tl.arange(0, SPLITS)
        peak = tl.load(peaks + part)
        base = tl.max(peak, axis=0)
        weight = tl.exp2(peak - tl.where(base == float("-inf"), 0.0, base))
        total = tl.sum(weight * tl.load(sums + part), axis=0)
        acc = tl.load(parts + part[:, None] * DV + dv[None, :], mask=(dv < DV)[None, :], other=0.0)
        result = tl.sum(acc * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
        tl.store(out + row * DV + dv, narrow(result, out.dtype.element_ty), mask=dv < DV)


@dataclass(frozen=True, slots=True)
class Parts:
    """What the programs of one launch leave per row and split: weighted values, largest scores, sums of weights.

    With one split `sums_of_values` is the result itself.
    """

    splits: int
    sums_of_values: Tensor
    peaks: Tensor
    sums: Tensor

    @staticmethod
    def of(out: Tensor, num_programs: int, num_keys: int) -> "Parts":
        """Enough splits that `num_programs` times them keep the device busy, none under 256 of at most `num_keys`."""
        wanted = min(2 * cores(out.device) // num_programs, num_keys // _MIN_KEYS, _MAX_SPLITS)
        splits = power_of_two(wanted + 1) // 2 if wanted > 1 else 1
        if splits == 1:
            return Parts(1, out, out, out)
        shape = (*out.shape[:-1], splits)
        peaks = torch.empty(shape, dtype=torch.float32, device=out.device)
        return Parts(splits, peaks.new_empty(*shape, out.shape[-1]), peaks, torch.empty_like(peaks))

    def merge(self, out: Tensor) -> None:
        if self.splits == 1:
            return
        rows, width = self.peaks.numel() // self.splits, out.shape[-1]
        _merge[programs(rows)](
            self.sums_of_values, self.peaks, self.sums, out, rows,
            DV=width, SPLITS=self.splits, DV_BLOCK=power_of_two(width),
        )  # fmt: skip
