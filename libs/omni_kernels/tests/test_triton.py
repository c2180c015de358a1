"""The Triton kernels hold to the meaning in Triton's interpreter, and compile for an NVIDIA GPU without one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from omni_kernels.load import load
from omni_kernels.ops import OPS

pytestmark = pytest.mark.timeout(600)
pytest.importorskip("triton", reason="triton is not installed")

CASES = Path(__file__).with_name("triton_cases.py")
SHARED_MEMORY_OF_H100 = 227 * 1024


def lines(mode: str, **environment: str) -> list[dict[str, Any]]:
    """What `triton_cases.py` prints. Triton reads TRITON_INTERPRET on import, so it needs a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, str(CASES), mode],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def conformance() -> list[dict[str, Any]]:
    return lines("interpret", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return lines("compile", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))


@pytest.mark.parametrize("name", OPS)
def test_kernel_conforms(name: str, conformance: list[dict[str, Any]]) -> None:
    rows = [row for row in conformance if row["op"] == name]
    assert [problem for row in rows for problem in row["failures"]] == []
    assert sum(row["cases"] for row in rows) > 0, "the backend has no kernel for this op"
    assert all(row["fake"] == row["cases"] for row in rows)


@pytest.mark.parametrize("name", OPS)
def test_kernel_compiles_and_fits_a_gpu(name: str, compiled: list[dict[str, Any]]) -> None:
    kernels = [line for line in compiled if line["op"] == name]
    assert kernels
    assert max(line["shared"] for line in kernels) <= SHARED_MEMORY_OF_H100


@pytest.mark.parametrize(
    ("op", "kernel"),
    [
        ("paged_attention", "_attend"),
        ("mla_attention", "_attend_latent"),
        ("indexer_top_k", "_score"),
        ("grouped_matmul", "_multiply"),
        ("grouped_matmul_w8a8", "_multiply"),
        ("grouped_matmul_w4a8", "_multiply_int4"),
    ],
)
def test_products_run_on_tensor_cores(op: str, kernel: str, compiled: list[dict[str, Any]]) -> None:
    assert [line["tensor_cores"] for line in compiled if (line["op"], line["kernel"]) == (op, kernel)] == [True]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets")
def test_on_cpu_only_the_interpreter_runs_triton() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        load("triton", "cpu")
