"""Choose a backend by name. Nothing is chosen silently: a backend that cannot be had is an error with its fix."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from omni_kernels.ops import OPS


@dataclass(frozen=True, slots=True)
class Backend:
    """The devices it has kernels for, the usual one first, and what to do where it cannot be imported."""

    devices: tuple[str, ...]
    fix: str


BACKENDS: Mapping[str, Backend] = {
    "cpu": Backend(("cpu",), "install numba: pip install 'omni-kernels[cpu]'"),
    "npu": Backend(("npu",), "install torch_npu for this torch, and the CANN toolkit it names"),
    "triton": Backend(("cuda", "npu", "cpu"), "install triton (NVIDIA) or triton-ascend (Ascend)"),
}
MEANING = "meaning"
"""Stands for a backend where an op runs as its meaning."""

_KEYS: Mapping[str, str] = {"cpu": "CPU", "cuda": "CUDA", "npu": "PrivateUse1"}
_loaded: dict[str, tuple[str, torch.library.Library, frozenset[str]]] = {}


def kernels_of(backend: str) -> Mapping[str, Callable[..., Any]]:
    """The kernels of `backend`, by the name of their op. Imports it.

    Raises:
        ValueError: no backend of that name; the message lists the known ones.
        RuntimeError: it cannot be imported here; the message says what to install.
    """
    if backend not in BACKENDS:
        raise ValueError(f"no backend {backend!r}; there are {', '.join(BACKENDS)}")
    try:
        kernels: Mapping[str, Callable[..., Any]] = importlib.import_module(f"omni_kernels.backends.{backend}").KERNELS
    except ImportError as error:
        raise RuntimeError(f"backend {backend!r} cannot be loaded ({error}); {BACKENDS[backend].fix}") from error
    return kernels


def load(
    backend: str,
    device: str | None = None,
    wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]] | None = None,
) -> None:
    """Let the kernels of `backend` run the ops on `device`; ops it has no kernel for stay their meaning.

    A device has one backend for the life of the process; loading the same one again does nothing.
    What `wrap` makes of an op's name and kernel is called in the kernel's place.
    `device` is cpu, cuda or npu, by default the usual one of the backend. Triton runs on cpu in its interpreter only.

    Raises:
        ValueError: no such backend, or it has no kernels for that device.
        RuntimeError: the backend cannot be imported here, or the device has another backend already.
    """
    kernels = kernels_of(backend)
    device = device or BACKENDS[backend].devices[0]
    if device not in BACKENDS[backend].devices:
        raise ValueError(f"device: {backend} runs on {', '.join(BACKENDS[backend].devices)}, not {device}")
    if backend == "triton" and device == "cpu" and not _interpreting():
        raise RuntimeError("triton runs on cpu in its interpreter only: set TRITON_INTERPRET=1 before Python starts")
    if device in _loaded:
        if _loaded[device][0] != backend:
            raise RuntimeError(f"device {device} has backend {_loaded[device][0]!r} already; start another process")
        return
    library = torch.library.Library("omni", "IMPL")
    for name, kernel in kernels.items():
        library.impl(name, kernel if wrap is None else wrap(name, kernel), _KEYS[device])
    _loaded[device] = (backend, library, frozenset(kernels))


def active(device: str | None = None) -> dict[str, str]:
    """Which backend runs each op on `device`: its name, or "meaning".

    `device` is by default the accelerator a backend is loaded for, or cpu.
    """
    device = device or next((name for name in ("npu", "cuda") if name in _loaded), "cpu")
    backend, _, ops = _loaded.get(device, (MEANING, None, frozenset()))
    return {name: backend if name in ops else MEANING for name in OPS}


def _interpreting() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)
