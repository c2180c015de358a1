"""Refusal of what the wheels' documentation does not allow."""

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
GARBAGE = -77
"""Fills integers that are documented to be undefined; floats are NaN."""


class Undocumented(ValueError):
    """A call that an NPU may refuse, or answer with anything."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Undocumented(what)


def require_dtype(name: str, x: Tensor, *dtypes: torch.dtype) -> None:
    require(x.dtype in dtypes, f"{name}: dtype {x.dtype} is not among those documented")


def refuse_given(**unused: object) -> None:
    """Arguments that a twin does not model must be left at their defaults (None or False)."""
    for name, value in unused.items():
        require(value is None or value is False, f"{name}: the twin does not model it")
