"""How often each op ran in this process, and on which backend.

Kernels are counted where torch's dispatcher calls them, so that calls from compiled graphs are counted too: one integer
added per call. An op without a kernel of the backend runs as its meaning, and is counted as that.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from omni_kernels.load import BACKENDS, MEANING, active, load
from omni_kernels.ops import OPS

_KEYS = {"cpu": "CPU", "cuda": "CUDA", "npu": "PrivateUse1"}
_calls: dict[tuple[str, str], list[int]] = {}
_library: torch.library.Library | None = None


def load_counted(backend: str) -> None:
    """Load `backend` for its usual device and count from here on; a second time does nothing.

    Raises what `load` raises.
    """
    global _library
    if _library is not None:
        return
    load(backend, wrap=lambda name, kernel: _counted(name, backend, kernel))
    device = BACKENDS[backend].devices[0]
    _library = torch.library.Library("omni", "IMPL")
    for name, running in active(device).items():
        if running == MEANING:
            _library.impl(name, _counted(name, MEANING, OPS[name].meaning), _KEYS[device])


def calls() -> dict[str, dict[str, int]]:
    """op -> backend -> calls so far, of the ops that ran."""
    counts: dict[str, dict[str, int]] = {}
    for (op, backend), cell in _calls.items():
        if cell[0]:
            counts.setdefault(op, {})[backend] = cell[0]
    return counts


def _counted(name: str, backend: str, run: Callable[..., Any]) -> Callable[..., Any]:
    cell = _calls.setdefault((name, backend), [0])

    @wraps(run)
    def call(*inputs: Any) -> Any:
        cell[0] += 1
        return run(*inputs)

    return call
