"""Read a quantized checkpoint back, by the library that engines read it by, and hold it against the original."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs  # type: ignore[import-untyped]
from compressed_tensors.quantization.lifecycle.forward import dequantize  # type: ignore[import-untyped]
from safetensors import safe_open

from omni_kernels.quantize.checkpoint import SCALE, files_of
from omni_kernels.quantize.choice import Choice

# Rounding to 127 steps leaves about 0.6% of a Gaussian row of usual width; a channel with one huge weight more.
LIMIT = 0.05
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class Row:
    """Matrices of one name: relative error ||W - dequantized|| / ||W|| in the mean and at worst, and bytes."""

    layer: str
    scheme: str
    matrices: int
    mean_error: float
    worst_error: float
    bytes_before: int
    bytes_after: int


def verify(model: Path, out: Path, choice: Choice, scheme: str) -> list[Row]:
    """A row for each quantized matrix, the experts of a layer together, and one for all that was kept.

    Raises ValueError for a tensor that is missing, changed though it was to be kept, or further off than LIMIT.
    """
    chosen, kept = frozenset(choice.quantized), [0, 0]
    found: dict[str, list[tuple[float, int, int]]] = {}
    for before, after in _pairs(model, out):
        with safe_open(before, "pt") as source, safe_open(after, "pt") as copy:
            for name in source.keys():  # noqa: SIM118  # a file, not a mapping
                if name not in chosen:
                    original, same = source.get_tensor(name), copy.get_tensor(name)
                    if original.dtype != same.dtype or not torch.equal(original, same):
                        raise ValueError(f"{name}: was to be kept, and differs")
                    kept = [kept[0] + 1, kept[1] + same.nbytes]
                    continue
                error, sizes = _error(name, source, copy)
                found.setdefault(_EXPERT.sub(".experts.*.", name), []).append((error, *sizes))
    rows = [
        Row(
            name.removesuffix(".weight"),
            scheme,
            len(each),
            sum(error for error, _, _ in each) / len(each),
            max(error for error, _, _ in each),
            sum(size for _, size, _ in each),
            sum(size for _, _, size in each),
        )
        for name, each in found.items()
    ]
    return [*rows, Row("(all others)", "kept", kept[0], 0.0, 0.0, kept[1], kept[1])]


def _pairs(model: Path, out: Path) -> Iterator[tuple[Path, Path]]:
    for path in files_of(model):
        if not (out / path.name).exists():
            raise ValueError(f"{out / path.name}: is missing")
        yield path, out / path.name


def _error(name: str, source: Any, copy: Any) -> tuple[float, tuple[int, int]]:
    original = source.get_tensor(name)
    codes, scale = copy.get_tensor(name), copy.get_tensor(f"{name.removesuffix('weight')}{SCALE}")
    if codes.dtype != torch.int8 or codes.shape != original.shape or scale.shape != (len(codes), 1):
        raise ValueError(f"{name}: is {codes.dtype} {tuple(codes.shape)}, its scale {tuple(scale.shape)}")
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    distance = (original.float() - dequantize(codes, scale, args=args, dtype=torch.float32)).norm()
    error = float(distance / original.float().norm().clamp_min(1e-30))
    if not error <= LIMIT:
        raise ValueError(
            f"{name}: relative error {error:.3f} is above {LIMIT}; its rows have outliers int8 cannot hold"
        )
    return error, (original.nbytes, codes.nbytes + scale.nbytes)
