"""Holds every op and every kernel against the op's float64 meaning, its fake form and its validator.

`python -m omni_kernels.conformance BACKEND DEVICE SECONDS [OP ...]` prints the rows of one backend as JSON, one a line;
this is how Triton's kernels are run in their interpreter, which a process has to be started for.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import process_time
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from omni_kernels.case import Case, Op, dtype_name
from omni_kernels.load import kernels_of
from omni_kernels.ops import OPS

MAX_FAILURES = 3

Kernel = Callable[..., Any]


@dataclass(slots=True)
class Row:
    """One op on one backend with inputs of one dtype.

    `error` is the largest distance to the float64 meaning over all floating outputs, `share` the same in parts of the
    tolerance. `fake`: cases whose shapes, dtypes and strides are those of the fake form. `refused` of `wrong`: calls
    with a wrong argument that the validator refused by its name. `left_out`: cases there was no time for. `failures`
    says the first problems.
    """

    op: str
    backend: str
    dtype: str
    cases: int = 0
    error: float = 0.0
    share: float = 0.0
    fake: int = 0
    refused: int = 0
    wrong: int = 0
    left_out: int = 0
    failures: list[str] = field(default_factory=list)

    def fail(self, problem: str) -> None:
        if len(self.failures) < MAX_FAILURES:
            self.failures.append(problem)


def rows(op: Op[..., Any], kernels: Mapping[str, Kernel], device: torch.device, limit_s: float = math.inf) -> list[Row]:
    """Rows of `op` by backend (`kernels`: backend -> kernel of the op) and dtype of its inputs on `device`.

    With a limit in seconds of this process's time small cases come first, the first of which is not counted. Once it
    is spent cases of dtypes seen before are left out, and any that would take three times as long by itself.
    """
    found: dict[tuple[str, str], Row] = {}
    cases = list(op.samples(device))
    if limit_s < math.inf:
        cases.sort(key=_size)
    start, pace = process_time(), 0.0
    for case in cases:
        dtype, begun = _dtype_of(case), process_time()
        of_case = [found.setdefault((backend, dtype), Row(op.name, backend, dtype)) for backend in kernels]
        late = begun - start > limit_s and all(row.cases for row in of_case)
        if late or pace * _size(case) > 3 * limit_s:
            for row in of_case:
                row.left_out += 1
            continue
        expected = reference(op, case)
        for row in of_case:
            _try(row, op, kernels[row.backend], case, expected)
        if case is cases[0]:
            start = process_time()
        else:
            pace = (process_time() - begun) / _size(case)
    return list(found.values())


def _size(case: Case) -> int:
    return 1 + sum(value.numel() for value in case.inputs if isinstance(value, Tensor))


def _try(row: Row, op: Op[..., Any], kernel: Kernel, case: Case, expected: Sequence[Tensor]) -> None:
    row.cases += 1
    inputs = _copies(case.inputs)
    try:
        results = outputs(op, kernel, inputs)
    except Exception as error:
        row.fail(f"{case}: {type(error).__name__}: {error}")
        return
    for position, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        distance, share, problem = compare(result, wanted, case, position)
        row.error, row.share = max(row.error, distance), max(row.share, share)
        if problem:
            row.fail(f"{case}: output {position}: {problem}")
    problem = fake_differs(op, case, results) or _shares_memory(op, inputs, results) or _written(op, case, inputs)
    row.fake += not problem
    if problem:
        row.fail(f"{case}: {problem}")
    row.wrong += len(wrong := list(wrong_calls(case)))
    for name, call in wrong:
        if problem := not_refused(op, call):
            row.fail(f"{case} with {name}: {problem}")
        else:
            row.refused += 1


def reference(op: Op[..., Any], case: Case) -> list[Tensor]:
    """What the op means, computed in float64, on the device of the case."""
    return outputs(op, op.meaning, [_double(value) for value in _copies(case.inputs)])


def outputs(op: Op[..., Any], kernel: Kernel, inputs: Sequence[Any]) -> list[Tensor]:
    """The results of a call, and after them the arguments it writes to."""
    result = kernel(*inputs)
    returned = [result] if isinstance(result, Tensor) else list(result or ())
    return returned + [inputs[position] for position in _mutated(op)]


def compare(result: Tensor, wanted: Tensor, case: Case, position: int) -> tuple[float, float, str]:
    """(largest error, the same in parts of the tolerance, what is wrong or "") of one output."""
    if result.shape != wanted.shape:
        return 0, 0, f"shape {tuple(result.shape)}, not {tuple(wanted.shape)}"
    if result.numel() == 0:
        return 0, 0, ""
    if not result.is_floating_point():
        off = (result.long() - wanted.long()).abs()
        count, loose = int(off.count_nonzero()), position in case.loose
        fine = not count or (loose and int(off.max()) <= 1 and count <= max(1, case.loose_share * off.numel()))
        return 0, 0, "" if fine else f"{count} of {off.numel()} differ, by up to {int(off.max())}"
    left, right = result.double(), wanted.double()
    same = left == right
    error = torch.where(same, 0, (left - right).abs()).nan_to_num(torch.inf, torch.inf)
    share = torch.where(same, 0, error / (case.atol + case.rtol * right.abs())).nan_to_num(torch.inf, torch.inf)
    worst, most = float(error.max()), float(share.max())
    beyond = int((share > 1).sum())
    return worst, most, f"{beyond} of {share.numel()} beyond the tolerance, by up to {worst:.3g}" if beyond else ""


def fake_differs(op: Op[..., Any], case: Case, results: Sequence[Tensor]) -> str:
    """How the fake form differs from `results` in shape, dtype or strides; "" where it does not."""
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in case.inputs]
        forms = outputs(op, op.call, inputs)
    for position, (form, result) in enumerate(zip(forms, results, strict=True)):
        for what, form_s, result_s in (
            ("shape", form.shape, result.shape),
            ("dtype", form.dtype, result.dtype),
            ("strides", _strides(form), _strides(result)),
        ):
            if form_s != result_s:
                return f"output {position}: {what} {result_s}, of its fake form {form_s}"
    return ""


def _strides(x: Tensor) -> list[int]:
    """Of the dimensions that are stepped along."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1] if x.numel() else []


def wrong_calls(case: Case) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The call of `case` with one of its tensors replaced: by complex numbers, which no op takes, and by one number."""
    for position, value in enumerate(case.inputs):
        if isinstance(value, Tensor) and value.ndim:
            for name, wrong in (
                ("complex", torch.empty(value.shape, dtype=torch.complex64, device=value.device)),
                ("one number as", value.new_empty(())),
            ):
                yield f"{name} argument {position}", (*case.inputs[:position], wrong, *case.inputs[position + 1 :])


def not_refused(op: Op[..., Any], inputs: Sequence[Any]) -> str:
    """Why a wrong call does not count as refused; "" where the validator raises ValueError naming an argument."""
    try:
        op.check(*inputs)
    except ValueError as error:
        named = str(error).partition(":")[0]
        return "" if named in parameters(op) else f"refused without naming an argument: {error}"
    except Exception as error:
        return f"{type(error).__name__} instead of ValueError: {error}"
    return "not refused"


def parameters(op: Op[..., Any]) -> list[str]:
    schema = getattr(torch.ops.omni, op.name).default._schema
    return [argument.name for argument in schema.arguments]


def measure(backend: str, device: str, names: Sequence[str], limit_s: float = math.inf) -> Iterator[Row]:
    """Rows of one backend in this process, op by op. Raises RuntimeError where it cannot be imported."""
    kernels = kernels_of(backend)
    for name in names:
        if name in kernels:
            yield from rows(OPS[name], {backend: kernels[name]}, torch.device(device), limit_s)


def measure_apart(backend: str, device: str, names: Sequence[str], limit_s: float) -> Iterator[Row]:
    """Like `measure`, in a process of its own with Triton's interpreter on.

    Raises RuntimeError with its last words when it fails.
    """
    command = [sys.executable, "-m", "omni_kernels.conformance", backend, device, str(limit_s), *names]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None and child.stderr is not None
        for line in child.stdout:
            yield Row(**json.loads(line))
        words = child.stderr.read().strip()
    if child.returncode:
        raise RuntimeError(words.splitlines()[-1] if words else f"ended with {child.returncode}")


def _dtype_of(case: Case) -> str:
    tensors = [value for value in case.inputs if isinstance(value, Tensor)]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    return dtype_name((tensors if not tensors[0].is_floating_point() else floating)[0].dtype)


def _copies(inputs: Sequence[Any]) -> list[Any]:
    """Tensors anew, with the strides they have."""
    return [
        torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)
        if isinstance(value, Tensor)
        else value
        for value in inputs
    ]


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _mutated(op: Op[..., Any]) -> list[int]:
    names = parameters(op)
    return [names.index(name) for name in op.mutates]


def _shares_memory(op: Op[..., Any], inputs: Sequence[Any], results: Sequence[Tensor]) -> str:
    mutated = len(_mutated(op))
    returned = [result for result in results[: len(results) - mutated] if result.numel()]
    seen = {value.untyped_storage().data_ptr() for value in inputs if isinstance(value, Tensor)}
    for position, result in enumerate(returned):
        if result.untyped_storage().data_ptr() in seen:
            return f"output {position} shares memory with an argument or another output"
        seen.add(result.untyped_storage().data_ptr())
    return ""


def _written(op: Op[..., Any], case: Case, inputs: Sequence[Any]) -> str:
    for position, (before, after) in enumerate(zip(case.inputs, inputs, strict=True)):
        if isinstance(before, Tensor) and position not in _mutated(op) and not torch.equal(before, after):
            return f"argument {position} was written to"
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    for found in measure(sys.argv[1], sys.argv[2], sys.argv[4:] or list(OPS), float(sys.argv[3])):
        print(json.dumps(asdict(found)), flush=True)
