"""torch_npu's ops without its binary: declared from a wheel's schema files, shaped by the wheel's own meta kernels.

It changes torch's dispatcher and `sys.modules` for good, so it belongs into a process of its own (see `trial`).
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from functools import partial, wraps
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from omni_kernels.contract import schemas

# torch_npu's numbers for dtypes that torch lacks, and for a chip of the Atlas A3 series.
DTYPES: Mapping[str, int] = {
    "int4": 285,
    "hifloat8": 290,
    "float8_e5m2": 291,
    "float8_e4m3fn": 292,
    "float8_e8m0fnu": 293,
    "float4_e2m1fn_x2": 296,
    "float4_e1m2fn_x2": 297,
}
ATLAS_A3 = 250
CANN = "9.1.0"


class ErrCode(Enum):
    """The names the meta kernels pick from when they refuse a call."""

    PARAM = 1
    TYPE = 2
    VALUE = 3
    NOT_SUPPORT = 7


class Calls:
    """Where ops were called from since `torch_npu` was installed: (file, line, op)."""

    def __init__(self) -> None:
        self.sites: set[tuple[str, int, str]] = set()

    def note(self, frame: FrameType, op: str) -> None:
        self.sites.add((frame.f_code.co_filename, frame.f_lineno, op))


def install(texts: Path) -> Calls:
    """Declare the ops, put a `torch_npu` module into `sys.modules` and run the wheel's meta registrations.

    `texts` is the folder `wheels.unpacked` gives. Returns the record of the calls to come.
    """
    _setup_privateuseone_for_python_backend("npu")
    library = torch.library.Library(schemas.NAMESPACE, "FRAGMENT")
    declared: set[str] = set()
    for schema in schemas.declarations(texts):
        library.define(schema)
        declared.add(schema.partition("(")[0].partition(".")[0])
    calls = Calls()
    package = _package(declared, calls)
    registrations = texts / "torch_npu/op_plugin/meta/_meta_registrations.py"
    module = _run(registrations)
    # Both live as long as the process: a Library takes its registrations back when it is collected.
    package.__dict__.update(_library=library, _meta_registrations=module)
    return calls


def _package(ops: set[str], calls: Calls) -> ModuleType:
    """A `torch_npu` with the named ops and what the meta registrations import; nothing else is in it."""
    package = _module("torch_npu", **DTYPES)
    for name in sorted(ops):
        setattr(package, name, _recorded(name, calls))
    _module("torch_npu.utils")
    _module("torch_npu.utils._error_code", ErrCode=ErrCode, ops_error=lambda code: f" [{code.name}]")
    _module("torch_npu.npu", get_soc_version=lambda: ATLAS_A3)
    _module("torch_npu.npu.utils", get_cann_version=lambda *_: CANN, _is_gte_cann_version=lambda *_: True)
    _module("torch_npu.npu._backends", get_soc_version=lambda: ATLAS_A3)
    return package


def _recorded(name: str, calls: Calls) -> Callable[..., Any]:
    packet = getattr(torch.ops.npu, name)

    def call(*inputs: Any, **named: Any) -> Any:
        calls.note(sys._getframe(1), name)
        return packet(*inputs, **named)

    return call


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
    module.__path__ = []
    module.__dict__.update(content)
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)
    return module


def _run(path: Path) -> ModuleType:
    """Execute the wheel's file. Registrations of ops that the schema files do not declare are passed over."""
    module = _module("torch_npu._meta_registrations")
    original = torch.library.impl
    torch.library.impl = partial(_impl_where_declared, original)  # type: ignore[assignment]
    try:
        exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    finally:
        torch.library.impl = original
    return module


def _impl_where_declared(original: Callable[..., Any], library: Any, name: str, *rest: Any) -> Callable[..., Any]:
    decorate = original(library, name, *rest)

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        # A RuntimeError says that the schema files do not declare the op.
        with suppress(RuntimeError):
            decorate(_with_defaults(kernel))
        return kernel

    return register


def _with_defaults(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` that takes None for a last argument left out: some of the wheels' forget that their schema allows it."""
    parameters = [p for p in inspect.signature(kernel).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = sum(parameter.default is parameter.empty for parameter in parameters)

    @wraps(kernel)
    def call(*inputs: Any, **named: Any) -> Any:
        return kernel(*inputs, *[None] * (needed - len(inputs)), **named)

    return call
