"""The GPU bench refuses a machine without one; what it counts as the least work of an op is that work."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernelbench.roofline import Roof, Work, work_of

from omni_kernels.ops import OPS

BENCH = Path(__file__).parents[1]
ROOF = Roof(bytes_per_s=1e12, operations_per_s={torch.float32: 1e13, torch.bfloat16: 1e14, torch.int8: 2e14})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_refuses_and_says_what_is_missing() -> None:
    done = subprocess.run([sys.executable, "kernels_gpu.py"], cwd=BENCH, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("work", "seconds", "fraction"),
    [
        pytest.param(Work(1e9), 2e-3, 0.5, id="moving"),
        pytest.param(Work(1e9, 4e11, torch.bfloat16), 4e-3, 1.0, id="computing"),
        pytest.param(Work(1e9, 1e10, torch.bfloat16), 1e-3, 1.0, id="moving takes longer"),
        pytest.param(Work(0, 4e11, torch.int8), 4e-3, 0.5, id="int8 has its own roof"),
    ],
)
def test_fraction_of_the_roof(work: Work, seconds: float, fraction: float) -> None:
    assert ROOF.fraction(work, seconds) == pytest.approx(fraction)


def decode(length: int, rows: int = 1) -> tuple[torch.Tensor, ...]:
    """One sequence with `rows` newest rows; 8 query heads over 2, 64 wide, in bfloat16; a cache far larger."""
    cache = torch.zeros(100, 16, 2, 64, dtype=torch.bfloat16)
    starts, lengths = torch.tensor([0, rows], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    return torch.zeros(rows, 8, 64, dtype=torch.bfloat16), cache, cache, torch.zeros(1, 100), starts, lengths


def test_attention_reads_what_the_sequence_has_and_no_more_of_the_cache() -> None:
    inputs = decode(1000)
    work = work_of("paged_attention", (*inputs, 0.1), [torch.empty_like(inputs[0])])
    assert work.bytes == 2 * 8 * 64 * 2 + 1000 * 2 * (2 * 64 * 2)
    assert work.operations == 1000 * 8 * (2 * 64 + 2 * 64)
    assert work.dtype is torch.bfloat16


def test_a_prompt_sees_half_of_the_square() -> None:
    inputs = decode(100, rows=100)
    work = work_of("paged_attention", (*inputs, 0.1), [torch.empty_like(inputs[0])])
    assert work.operations == (100 * 101 / 2) * 8 * 256


def test_sink_and_recent_positions_are_all_that_is_read() -> None:
    inputs = decode(1000)
    work = work_of("sink_recent_attention", (*inputs, 0.1, 16, 84), [torch.empty_like(inputs[0])])
    assert work.operations == 100 * 8 * 256
    assert work.bytes == 2 * 8 * 64 * 2 + 100 * 2 * (2 * 64 * 2)


def test_weights_of_experts_without_rows_are_not_read() -> None:
    x, weight = torch.zeros(6, 32), torch.zeros(4, 32, 16)
    work = work_of("grouped_matmul", (x, weight, torch.tensor([4, 0, 2, 0])), [torch.zeros(6, 16)])
    assert work.bytes == 4 * (6 * 32 + 2 * 32 * 16 + 6 * 16)
    assert work.operations == 2 * 6 * 32 * 16


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_work(name: str) -> None:
    """What the partial counts take for the arguments of an op are those arguments."""
    op, most = OPS[name], 0.0
    for case in op.samples(torch.device("cpu")):
        if "tiny" in case.name and not case.name.endswith("float16"):
            result = op.meaning(*case.inputs)
            results = [result] if isinstance(result, torch.Tensor) else list(result or ())
            most = max(most, work_of(name, case.inputs, results).bytes)
    assert most > 0
