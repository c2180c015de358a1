"""Every op: its fake form and its meaning agree, its meaning equals an independent one, bad input is refused."""

import importlib.util

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from omni_kernels.case import Case, Op
from omni_kernels.load import load
from omni_kernels.ops import OPS

CPU = torch.device("cpu")
CASES = [pytest.param(op, case, id=str(case)) for op in OPS.values() for case in op.samples(CPU)]

# The same meaning as torch itself states it.
REFERENCES = {
    "rms_norm": lambda x, weight, eps: torch.nn.functional.rms_norm(x.double(), weight.shape, weight.double(), eps),
    "swiglu": lambda g: (
        torch.nn.functional.glu(torch.cat(g.double().chunk(2, -1)[::-1], -1), -1) * g.double().chunk(2, -1)[0]
    ),
}


@pytest.mark.parametrize(("op", "case"), CASES)
def test_meaning(op: Op, case: Case) -> None:
    expected = REFERENCES[op.name](*case.inputs).to(case.inputs[0].dtype)
    torch.testing.assert_close(op.call(*case.inputs), expected, atol=case.atol, rtol=case.rtol)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_fake_form_has_the_shape_and_dtype_of_the_meaning(op: Op, case: Case) -> None:
    real = op.call(*case.inputs)
    with FakeTensorMode() as mode:
        fake = op.call(*(mode.from_tensor(i) if isinstance(i, torch.Tensor) else i for i in case.inputs))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize(
    ("op", "inputs", "names"),
    [
        pytest.param("rms_norm", (torch.ones(2, 4), torch.ones(3), 1e-6), "weight", id="weight of another size"),
        pytest.param("rms_norm", (torch.ones(2, 4), torch.ones(2, 4), 1e-6), "weight", id="weight of two dimensions"),
        pytest.param("rms_norm", (torch.ones(2, 4), torch.ones(4), 0.0), "eps", id="eps zero"),
        pytest.param("swiglu", (torch.ones(2, 5),), "gate_up", id="odd"),
    ],
)
def test_bad_input_is_refused_by_name(op: str, inputs: tuple[object, ...], names: str) -> None:
    with pytest.raises(ValueError, match=f"^{names}: "):
        OPS[op].call(*inputs)


def test_an_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="cpu, npu"):
        load("gpu")


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is installed here")
def test_a_missing_backend_says_what_to_install() -> None:
    with pytest.raises(RuntimeError, match="torch_npu"):
        load("npu")
