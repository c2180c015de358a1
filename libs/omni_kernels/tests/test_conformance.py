"""Every op and its cpu kernel hold to the float64 meaning, fake form and validator; planted faults are found."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from omni_kernels.case import Case
from omni_kernels.conformance import Row, rows
from omni_kernels.load import kernels_of
from omni_kernels.ops import OPS
from omni_kernels.ops.rms_norm import RMS_NORM
from omni_kernels.table import one_thread

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize("name", OPS)
def test_meaning_and_cpu_kernel_conform(name: str) -> None:
    kernels = {"meaning": OPS[name].meaning}
    if name in kernels_of("cpu"):
        kernels["cpu"] = kernels_of("cpu")[name]
    found = rows(OPS[name], kernels, CPU)
    assert [problem for row in found for problem in row.failures] == []
    assert {row.backend for row in found} == set(kernels)


def in_half_precision(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps).half() * weight


def into_its_input(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x.copy_(RMS_NORM.meaning(x, weight, eps))
    return x


def in_another_order(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return RMS_NORM.meaning(x, weight, eps).transpose(0, -1).contiguous().transpose(0, -1)


def into_its_weight(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = RMS_NORM.meaning(x, weight, eps)
    weight.zero_()
    return y


def without_the_first_row(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return RMS_NORM.meaning(x[1:], weight, eps)


def not_a_number(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return RMS_NORM.meaning(x, weight, eps) / 0.0 * 0.0


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        pytest.param(in_half_precision, "beyond the tolerance", id="imprecise"),
        pytest.param(into_its_input, "shares memory", id="aliases"),
        pytest.param(in_another_order, "strides", id="strides"),
        pytest.param(into_its_weight, "was written to", id="writes an argument"),
        pytest.param(without_the_first_row, "shape", id="shape"),
        pytest.param(not_a_number, "beyond the tolerance, by up to inf", id="not a number"),
        pytest.param(lambda *_: torch.ones(2) + torch.ones(3), "RuntimeError", id="raises"),
    ],
)
def test_a_wrong_kernel_is_found(kernel: object, said: str) -> None:
    problems = [problem for row in rows(RMS_NORM, {"wrong": kernel}, CPU) for problem in row.failures]  # type: ignore[dict-item]
    assert any(said in problem for problem in problems)


def test_a_validator_that_lets_wrong_calls_through_is_found() -> None:
    lax = type(RMS_NORM)(**{name: getattr(RMS_NORM, name) for name in RMS_NORM.__slots__} | {"check": lambda *_: None})
    found: list[Row] = rows(lax, {"meaning": RMS_NORM.meaning}, CPU)
    assert all(row.refused == 0 < row.wrong for row in found)
    assert all("not refused" in " ".join(row.failures) for row in found)


def test_quantized_values_may_be_off_by_one_seldom_and_by_two_never() -> None:
    op = OPS["dynamic_quant"]
    x = torch.linspace(-1, 1, 400).reshape(1, 400)
    case = Case("ramp", (x,), 1e-7, 1e-6, loose=(0,))
    one_case = type(op)(**{name: getattr(op, name) for name in op.__slots__} | {"samples": lambda _: iter([case])})

    def nudged(step: int, count: int) -> object:
        def kernel(rows: Tensor) -> tuple[Tensor, Tensor]:
            q, scale = op.meaning(rows)
            q[0, 150 : 150 + count] += step
            return q, scale

        return rows(one_case, {"cpu": kernel}, CPU)[0].failures

    assert nudged(1, 4) == []
    assert nudged(1, 5) != []
    assert nudged(2, 1) != []
