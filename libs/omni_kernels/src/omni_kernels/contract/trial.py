"""Runs the npu kernels against one torch-npu release in this process: as shapes, and as numbers through the twins.

`python -m omni_kernels.contract.trial` reads a request (JSON) from its input and writes the answer to its output.
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from omni_kernels.case import Case, Op
from omni_kernels.checks import Unsupported
from omni_kernels.conformance import compare, outputs, parameters, reference
from omni_kernels.contract import meta, twin
from omni_kernels.contract.twin import AgainstMeta, ShapedByMeta, layout
from omni_kernels.contract.twins import TWINS, Twin
from omni_kernels.contract.wrong_calls import WrongCall, draw
from omni_kernels.ops import OPS

CPU = torch.device("cpu")
Kernel = Callable[..., Any]
MAX_FAILURES = 5
LENGTHS = ("query_start", "seq_lens")
"""Arguments that may lie on the host whatever the device."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A kernel file to stand for that of `op`, or (`twin`) a torch_npu op whose twin is made wrong."""

    name: str
    op: str
    file: str = ""
    twin: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """What to run: the `gates` (meta, twin) over every op that has an npu kernel, over `mutants`, and over wrong calls.

    `wrong_calls` is the seed and the number of them to draw.
    """

    texts: str
    gates: Sequence[str] = ()
    mutants: Sequence[Mutant] = ()
    wrong_calls: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class Outcome:
    """How the samples of one op went.

    `cases` ran, the kernel refused `unsupported` as beyond what its calls are documented for, `failures` names a few
    that failed, `notes` says what a reader should know.
    """

    cases: int = 0
    unsupported: int = 0
    failures: list[str] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)

    def fail(self, case: Case, problem: str) -> None:
        if len(self.failures) < MAX_FAILURES:
            self.failures.append(f"{case}: {problem}")


def shapes(op: Op[..., Any], kernel: Kernel, cases: Sequence[Case]) -> Outcome:
    """Run `kernel` over `cases` on tensors without data, torch_npu's ops being the wheel's meta kernels.

    The outputs' shapes and dtypes must be those of the op's fake form, and no tensor may be on another device.
    """
    outcome = Outcome()
    modes = FakeTensorMode(), FakeTensorMode(allow_non_fake_inputs=True)
    for case in cases:
        try:
            found, wanted = _layouts(op, kernel, case, modes, outcome.notes)
        except UnsupportedOperatorException as error:
            outcome.notes.add(f"no meta kernel: {error}")
            continue
        except Unsupported:
            outcome.unsupported += 1
            continue
        except Exception as error:
            found, wanted = f"{type(error).__name__}: {error}", "a result"
        outcome.cases += 1
        if found != wanted:
            outcome.fail(case, f"expected {wanted}, got {found}")
    return outcome


def _layouts(
    op: Op[..., Any], kernel: Kernel, case: Case, modes: tuple[FakeTensorMode, FakeTensorMode], notes: set[str]
) -> tuple[str, str]:
    """Layouts of the kernel's results and of the fake form's.

    A kernel that reads values gets lengths with values, on the host. One that reads others too, or makes a tensor of
    what it has read, gets all inputs with values on the CPU; then a tensor on the wrong device goes unseen.
    """
    with suppress(DataDependentOutputException, DynamicOutputShapeException):
        return _on_fakes(op, kernel, case, modes[0], ())
    notes.add("reads values on the host")
    with suppress(DataDependentOutputException, DynamicOutputShapeException, NotImplementedError):
        return _on_fakes(op, kernel, case, modes[1], LENGTHS)
    with ShapedByMeta():
        found = layout(kernel(*_copies(case)))
    with modes[0] as mode:
        return found, layout(op.fake(*(_on_npu(mode, v) if isinstance(v, Tensor) else v for v in case.inputs)))


def _on_fakes(
    op: Op[..., Any], kernel: Kernel, case: Case, mode: FakeTensorMode, on_host: Sequence[str]
) -> tuple[str, str]:
    named = zip(parameters(op), case.inputs, strict=False)
    with mode:
        inputs = [
            _on_npu(mode, value) if isinstance(value, Tensor) and name not in on_host else value
            for name, value in named
        ]
        return layout(kernel(*inputs)), layout(op.fake(*inputs))


def _on_npu(mode: FakeTensorMode, value: Tensor) -> Tensor:
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="npu")


def numbers(op: Op[..., Any], kernel: Kernel, cases: Sequence[Case]) -> Outcome:
    """Run `kernel` over `cases` on CPU tensors, torch_npu's ops being the twins.

    Its outputs must be those of the op's meaning, and every twin's shapes and dtypes those of the wheel's meta kernel.
    """
    outcome = Outcome()
    mode = FakeTensorMode()
    for case in cases:
        inputs = _copies(case)
        try:
            with AgainstMeta() as watch:
                results = outputs(op, kernel, inputs)
            outcome.notes |= {f"no meta kernel: {name}" for name in watch.without_meta}
            problem = _differs(op, case, results, mode) or _written(op, case, inputs)
        except Unsupported:
            outcome.unsupported += 1
            continue
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        outcome.cases += 1
        if problem:
            outcome.fail(case, problem)
    return outcome


def _differs(op: Op[..., Any], case: Case, results: Sequence[Tensor], mode: FakeTensorMode) -> str:
    with mode:
        forms = outputs(op, op.fake, [mode.from_tensor(v) if isinstance(v, Tensor) else v for v in case.inputs])
    if layout(results) != layout(forms):
        return f"expected {layout(forms)}, got {layout(results)}"
    for position, (result, wanted) in enumerate(zip(results, reference(op, case), strict=True)):
        problem = compare(result, wanted, case, position)[2]
        if problem:
            return f"output {position}: {problem}"
    return ""


def _written(op: Op[..., Any], case: Case, inputs: Sequence[Any]) -> str:
    for name, before, after in zip(parameters(op), case.inputs, inputs, strict=False):
        if isinstance(before, Tensor) and name not in op.mutates and not torch.equal(before, after):
            return f"argument {name} was written to"
    return ""


def _copies(case: Case) -> list[Any]:
    """Inputs anew, with the strides they have."""
    return [
        torch.empty_strided(v.shape, v.stride(), dtype=v.dtype).copy_(v) if isinstance(v, Tensor) else v
        for v in case.inputs
    ]


GATES: Mapping[str, Callable[[Op[..., Any], Kernel, Sequence[Case]], Outcome]] = {"meta": shapes, "twin": numbers}


def answer(request: Request) -> dict[str, Any]:
    """Run the request. Changes this process for good."""
    calls = meta.install(Path(request.texts))
    registered = twin.install()
    kernels: Mapping[str, Kernel] = importlib.import_module("omni_kernels.backends.npu").KERNELS
    found: dict[str, Any] = {}
    for name, kernel in kernels.items() if request.gates else ():
        calls.sites.clear()
        outcomes = _outcomes(name, kernel, request.gates)
        found[name] = {**outcomes, "file": kernel.__code__.co_filename, "sites": sorted(calls.sites)}
    mutants = {mutant.name: _mutant_outcomes(mutant, kernels) for mutant in request.mutants}
    drawn = draw(*request.wrong_calls)
    wrong = {str(call): passes_unchecked(call, kernels[call.op]) for call in drawn if call.op in kernels}
    del registered
    return {"kernels": found, "mutants": mutants, "wrong_calls": wrong}


def passes_unchecked(call: WrongCall, kernel: Kernel) -> bool:
    """Whether a wrong call gets through the kernel and the wheel's meta kernels with no validator before them."""
    mode = FakeTensorMode()
    try:
        with mode:
            inputs = [_on_npu(mode, value) if isinstance(value, Tensor) else value for value in call.inputs]
            kernel(*inputs, **call.named)
    except (DataDependentOutputException, DynamicOutputShapeException):
        try:
            with ShapedByMeta():
                kernel(*call.inputs, **call.named)
        except Exception:
            return False
    except Exception:
        return False
    return True


@cache
def _cases(op: str) -> Sequence[Case]:
    return list(OPS[op].samples(CPU))


def _outcomes(name: str, kernel: Kernel, gates: Sequence[str]) -> dict[str, Any]:
    return {gate: asdict(GATES[gate](OPS[name], kernel, _cases(name))) for gate in gates}


def _mutant_outcomes(mutant: Mutant, kernels: Mapping[str, Kernel]) -> dict[str, Any]:
    kernel = _kernel_of(Path(mutant.file), mutant.op) if mutant.file else kernels[mutant.op]
    wrong = twin.replaced(mutant.twin, _off_by_one(TWINS[mutant.twin])) if mutant.twin else nullcontext()
    with wrong:
        return {gate: asdict(_until_told(gate, mutant.op, kernel)) for gate in GATES}


def _until_told(gate: str, op: str, kernel: Kernel) -> Outcome:
    """The outcome of the first sample that fails, or of the last."""
    outcome = Outcome()
    for case in _cases(op):
        outcome = GATES[gate](OPS[op], kernel, [case])
        if outcome.failures:
            break
    return outcome


def _off_by_one(right: Twin) -> Twin:
    """A twin whose first result is one too large everywhere."""

    def wrong(*inputs: Any, **named: Any) -> Any:
        result = right(*inputs, **named)
        if isinstance(result, Tensor):
            return result + 1
        first, *rest = result
        return type(result)((first + 1, *rest))

    return wrong


def _kernel_of(file: Path, op: str) -> Kernel:
    specification = importlib.util.spec_from_file_location(file.stem, file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    kernel: Kernel = module.KERNELS[op]
    return kernel


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def request_of(content: dict[str, Any]) -> Request:
    return Request(**{**content, "mutants": [Mutant(**mutant) for mutant in content.get("mutants", ())]})


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump(answer(request_of(json.load(sys.stdin))), sys.stdout, default=_plain)
