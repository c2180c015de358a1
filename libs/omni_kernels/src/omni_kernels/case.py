"""What an op ships besides its meaning: inputs it is checked on, and how far a backend may stray."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, device


@dataclass(frozen=True, slots=True)
class Case:
    """One call of an op on real model shapes; `atol` and `rtol` hold for outputs of the inputs' dtype."""

    name: str
    inputs: tuple[Any, ...]
    atol: float
    rtol: float

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Op:
    """An op as torch knows it, and its sample inputs on a device."""

    name: str
    call: Callable[..., Tensor]
    samples: Callable[[device], Iterator[Case]]


# (model, hidden size, MoE intermediate size)
MODEL_SHAPES: Sequence[tuple[str, int, int]] = (
    ("tiny", 192, 96),
    ("qwen3-30b-a3b", 2048, 768),
    ("deepseek-v3", 7168, 2048),
)
