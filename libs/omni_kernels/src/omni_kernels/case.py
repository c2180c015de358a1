"""An op: its meaning, its fake form, its validator and the inputs it is checked on, declared to torch's dispatcher."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import device

P = ParamSpec("P")
R = TypeVar("R")

TOLERANCE: Mapping[torch.dtype, tuple[float, float]] = {
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-3, 1e-2),
    torch.float16: (1e-4, 2e-3),
}
"""(atol, rtol) of an op that rounds its result once to the dtype, with room for one more rounding on the way."""

_LIBRARY = torch.library.Library("omni", "DEF")


@dataclass(frozen=True, slots=True)
class Case:
    """One call of an op; `inputs` are tensors and plain values, as the op's parameters stand.

    Floating outputs may stray from the float64 meaning by atol + rtol * |meaning|. Integer outputs are equal; those at
    the positions `loose` (quantized values) may be off by one in a `loose_share` of their elements.
    """

    name: str
    inputs: tuple[Any, ...]
    atol: float
    rtol: float
    loose: tuple[int, ...] = ()
    loose_share: float = 0.01
    """A hundredth is for values that fall next to the edge of rounding, more for a step rounded to half precision."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Op(Generic[P, R]):
    """An op as torch knows it, `omni::<name>`.

    `call` checks its arguments and runs the kernel loaded for their device, or the meaning where none is;
    `samples` yields its cases on a device; `mutates` names the arguments written to.
    """

    name: str
    meaning: Callable[P, R]
    fake: Callable[P, R]
    check: Callable[P, None]
    samples: Callable[[device], Iterator[Case]]
    mutates: tuple[str, ...]
    call: Callable[P, R]

    def __str__(self) -> str:
        return self.name


def declare(
    name: str,
    meaning: Callable[P, R],
    fake: Callable[P, R],
    check: Callable[P, None],
    samples: Callable[[device], Iterator[Case]],
    mutates: tuple[str, ...] = (),
) -> Op[P, R]:
    """Declare `omni::<name>`; its schema is read off the annotations of `meaning`.

    `meaning` is plain torch for any device; it accumulates in float32 and stays in float64 when given float64.
    `check` raises ValueError("<argument>: ...") and looks at shapes, dtypes and plain values, never at what a tensor
    holds. `fake` gives outputs of the right shape, dtype and strides; it may take the arguments as checked.
    No result may share memory with an argument.
    """
    _LIBRARY.define(name + torch.library.infer_schema(meaning, mutates_args=mutates))
    _LIBRARY.impl(name, meaning, "CompositeExplicitAutograd")

    def checked_fake(*inputs: P.args, **named: P.kwargs) -> R:
        check(*inputs, **named)
        return fake(*inputs, **named)

    torch.library.register_fake(f"omni::{name}", checked_fake, lib=_LIBRARY)
    overload = getattr(torch.ops.omni, name).default

    @wraps(meaning)
    def call(*inputs: P.args, **named: P.kwargs) -> R:
        check(*inputs, **named)
        result: R = overload(*inputs, **named)
        return result

    return Op(name, meaning, checked_fake, check, samples, mutates, call)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model that samples are cut from. `rank` and `rope` are those of MLA, 0 where the model has none."""

    name: str
    hidden: int
    intermediate: int
    """Of one expert."""
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int
    rank: int = 0
    rope: int = 0
    groups: int = 1
    top_k_groups: int = 1


TINY = ModelShape("tiny", 192, 96, 8, 2, 4, 2, 32, rank=64, rope=16, groups=2, top_k_groups=1)
QWEN3_MOE = ModelShape("qwen3-30b-a3b", 2048, 768, 128, 8, 32, 4, 128)
DEEPSEEK_V3 = ModelShape("deepseek-v3", 7168, 2048, 256, 8, 128, 128, 128, rank=512, rope=64, groups=8, top_k_groups=4)
PANGU_ULTRA_MOE = ModelShape("pangu-ultra-moe", 7680, 2048, 256, 8, 128, 128, 128, rank=512, rope=64)
MODELS: Sequence[ModelShape] = (TINY, QWEN3_MOE, DEEPSEEK_V3, PANGU_ULTRA_MOE)
