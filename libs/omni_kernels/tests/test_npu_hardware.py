"""On an Ascend NPU: every op gives what it means, and some of them captured in a graph.

Run by `python -m pytest -m npu libs/omni_kernels/tests/test_npu_hardware.py`; docs/ascend.md has the rest.
"""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_kernels.checks import Unsupported
from omni_kernels.conformance import compare, outputs, reference
from omni_kernels.load import active, kernels_of, load
from omni_kernels.ops import OPS


def _why_not() -> str:
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    try:
        import torch_npu
    except ImportError as error:
        return f"torch_npu cannot be imported: {error}"
    return "" if torch_npu.npu.is_available() else "torch_npu sees no NPU"


REASON = _why_not()
pytestmark = [pytest.mark.npu, pytest.mark.skipif(bool(REASON), reason=REASON), pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    load("npu")


@pytest.mark.parametrize("name", OPS)
def test_an_op_on_the_npu_is_what_it_means(name: str) -> None:
    """Through the dispatcher, as engines call it: the npu kernel where there is one, else the meaning on the device."""
    op, problems, ran = OPS[name], [], 0
    for case in op.samples(torch.device("npu")):
        try:
            results = outputs(op, op.call, [_copy(value) for value in case.inputs])
        except Unsupported:
            continue
        ran += 1
        for position, (result, wanted) in enumerate(zip(results, _on_cpu(name, case), strict=True)):
            problem = compare(result.cpu(), wanted, case, position)[2]
            if problem:
                problems.append(f"{case}: output {position}: {problem}")
    assert problems == []
    assert ran


def _copy(value: Any) -> Any:
    """A tensor anew, with the strides it has."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)


def _on_cpu(name: str, case: Any) -> list[Tensor]:
    """The meaning in float64, which NPUs do not compute in."""
    inputs = tuple(value.cpu() if isinstance(value, Tensor) else value for value in case.inputs)
    here = type(case)(case.name, inputs, case.atol, case.rtol, case.loose)
    return reference(OPS[name], here)


def test_every_kernel_is_active() -> None:
    assert {name for name, backend in active("npu").items() if backend == "npu"} == set(kernels_of("npu"))


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "grouped_matmul"])
def test_an_op_is_captured_in_a_graph(name: str) -> None:
    """A captured call gives, when replayed, what the call gives."""
    import torch_npu

    op = OPS[name]
    case = next(case for case in op.samples(torch.device("npu")) if case.inputs[0].dtype is torch.bfloat16)
    expected = op.call(*case.inputs)
    graph = torch_npu.npu.NPUGraph()
    with torch_npu.npu.graph(graph):
        result = op.call(*case.inputs)
    graph.replay()
    torch_npu.npu.synchronize()
    torch.testing.assert_close(result, expected, atol=0, rtol=0)
