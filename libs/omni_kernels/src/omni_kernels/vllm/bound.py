"""Ops as the engine's hot path calls them."""

from collections.abc import Callable
from typing import Any

import torch

from omni_kernels.case import Op


def bound(op: Op[..., Any]) -> Callable[..., Any]:
    """torch's own overload of the op, without the checks in Python that `Op.call` makes before each call.

    The layers that call it are built from one model configuration, so shapes and dtypes are as right in every step as
    in the first; where a model is compiled, the op's fake form has checked them while the graph was traced.
    """
    overload: Callable[..., Any] = getattr(torch.ops.omni, op.name).default
    return overload
