"""Registers the CPU meanings of torch_npu's ops, so that production call sites run on CPU tensors.

Needs the ops declared (`meta.install`), and like that belongs into a process of its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from omni_kernels.contract.schemas import NAMESPACE
from omni_kernels.contract.twins import TWINS, UNDEFINED, Twin

_PRESENT: dict[str, Twin] = dict(TWINS)


def install() -> torch.library.Library:
    """Register every twin whose op the installed schemas have. The registrations end with the library returned."""
    library = torch.library.Library(NAMESPACE, "IMPL")
    for name in TWINS:
        if hasattr(torch.ops.npu, name):
            library.impl(name, _through(name), "CPU")
    return library


def _through(name: str) -> Callable[..., Any]:
    def call(*inputs: Any, **named: Any) -> Any:
        return _PRESENT[name](*inputs, **named)

    return call


@contextmanager
def replaced(name: str, other: Twin) -> Iterator[None]:
    """Let `other` stand for the twin of `name`: how a wrong reference is planted."""
    _PRESENT[name] = other
    try:
        yield
    finally:
        _PRESENT[name] = TWINS[name]


class Disagreement(Exception):
    """A twin and the wheel's meta kernel differ in the shape or dtype of an output."""


class AgainstMeta(TorchDispatchMode):
    """Runs torch_npu's ops as their twins and compares every result with that of the wheel's meta kernel.

    `without_meta` gathers the ops the wheel has no meta kernel for.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.without_meta: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace != NAMESPACE:
            return func(*args, **(kwargs or {}))
        shaped = self._shapes(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if shaped is not None and layout(shaped, UNDEFINED.get(name, ())) != layout(result, UNDEFINED.get(name, ())):
            raise Disagreement(f"{name}: twin gives {layout(result)}, meta kernel {layout(shaped)}")
        return result

    def _shapes(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "Meta"):
            self.without_meta.add(func._schema.name.partition("::")[2])
            return None
        return func(*on_meta(args), **on_meta(kwargs))


class ShapedByMeta(AgainstMeta):
    """Runs torch_npu's ops as meta kernels only: every output is zeros of the shape and dtype they state."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace != NAMESPACE:
            return func(*args, **(kwargs or {}))
        shaped = self._shapes(func, args, kwargs or {})
        return tree_map_only(Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), shaped)


def on_meta(values: Any) -> Any:
    """`values` with every tensor replaced by one without data, of the same shape, strides and dtype."""
    return tree_map_only(
        Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), values
    )


def layout(result: Any, left_out: Sequence[int] = ()) -> str:
    """Shapes and dtypes of a result, for comparison and for people: `bfloat16[7, 192], float32[7, 1]`."""
    outputs = [result] if isinstance(result, Tensor) else list(result or ())
    tensors = [output for position, output in enumerate(outputs) if position not in left_out]
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors) or "nothing"
