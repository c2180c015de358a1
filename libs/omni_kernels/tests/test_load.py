"""Backends are loaded by name and by device, never silently; the command line says what is missing."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from omni_kernels.commands import app
from omni_kernels.load import active, kernels_of, load
from omni_kernels.ops import OPS


def run(program: str) -> str:
    """Run `program` in a process of its own; what it prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_loaded_backend_runs_on_its_device_and_no_other_takes_its_place() -> None:
    seen = json.loads(
        run(
            """
import json, sys, torch, types
import omni_kernels.load as loading
from omni_kernels.load import active, kernels_of, load
from omni_kernels.ops.swiglu import swiglu

before = active()
kernels = dict(kernels_of("cpu"))
calls = []
import omni_kernels.backends.cpu as cpu
cpu.KERNELS = {**kernels, "swiglu": lambda x: (calls.append(x.shape), kernels["swiglu"](x))[1]}
load("cpu")
load("cpu")
swiglu(torch.ones(2, 4))
torch.ops.omni.swiglu(torch.ones(2, 4))

loading.BACKENDS = {**loading.BACKENDS, "other": loading.Backend(("cpu",), "")}
sys.modules["omni_kernels.backends.other"] = types.SimpleNamespace(KERNELS={})
try:
    load("other")
    refused = ""
except RuntimeError as error:
    refused = str(error)
seen = {"before": before, "after": active(), "other": active("npu"), "calls": len(calls), "refused": refused}
print(json.dumps(seen))
"""
        )
    )
    assert set(seen["before"].values()) == set(seen["other"].values()) == {"meaning"}
    assert seen["before"].keys() == seen["after"].keys() == OPS.keys()
    assert {op for op, backend in seen["after"].items() if backend == "cpu"} == set(kernels_of("cpu"))
    assert seen["calls"] == 2
    assert seen["refused"] == "device cpu has backend 'cpu' already; start another process"


def test_an_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="cpu, npu, triton"):
        load("gpu")


def test_a_device_that_a_backend_has_no_kernels_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^device: cpu runs on cpu, not cuda"):
        load("cpu", device="cuda")


@pytest.mark.skipif(find_spec("torch_npu") is not None, reason="torch_npu is installed here")
def test_a_missing_backend_says_what_to_install() -> None:
    with pytest.raises(RuntimeError, match=r"torch_npu.*CANN"):
        load("npu")
    assert set(active("npu").values()) == {"meaning"}


def test_table_shows_an_op_and_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    options = ["table", "--op", "swiglu", "--backend", "meaning", "--backend", "cpu", "--json", str(file)]
    shown = CliRunner().invoke(app, options)
    assert shown.exit_code == 0, shown.output
    rows = json.loads(file.read_text())["rows"]
    assert {(row["op"], row["backend"]) for row in rows} == {("swiglu", "meaning"), ("swiglu", "cpu")}
    assert all(0 < row["share"] <= 1 and row["fake"] == row["cases"] for row in rows)
    assert "swiglu" in shown.output
    assert "bfloat16" in shown.output


def test_a_failure_is_named_and_ends_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni_kernels.backends.cpu.KERNELS", {"swiglu": lambda x: OPS["swiglu"].meaning(x) + 1})
    shown = CliRunner().invoke(app, ["table", "--op", "swiglu", "--backend", "cpu"])
    assert shown.exit_code == 1
    assert "FAILED swiglu on cpu: swiglu-tiny-float32: output 0" in shown.output


@pytest.mark.skipif(find_spec("torch_npu") is not None, reason="torch_npu is installed here")
def test_a_backend_that_is_not_here_is_shown_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni_kernels.table.contract_rows", dict)
    shown = CliRunner().invoke(app, ["table", "--op", "swiglu", "--backend", "npu"])
    assert shown.exit_code == 0
    assert "npu was not run" in shown.output
    assert "No module named 'torch_npu'" in shown.output


def test_unknown_names_are_refused() -> None:
    shown = CliRunner().invoke(app, ["table", "--op", "swigloo"])
    assert shown.exit_code == 2
    assert "swigloo" in shown.output


def test_the_command_needs_torch_when_it_runs_and_not_before() -> None:
    said = run(
        """
import sys
from typer.testing import CliRunner
sys.modules["torch"] = None
from omni_kernels.commands import app
print(CliRunner().invoke(app, ["--help"]).exit_code)
ran = CliRunner().invoke(app, ["table"])
print(ran.exit_code, ran.output)
"""
    )
    assert said.startswith("0\n1 error: ")
    assert "pip install 'omni-kernels[torch]'" in said
