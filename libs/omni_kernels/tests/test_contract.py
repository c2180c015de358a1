"""Every npu kernel keeps the contract of the pinned torch-npu releases; each gate fails when its fault is planted."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import omni_kernels
from omni_kernels.contract.report import lint_tree, never_run, rows, trials

pytestmark = pytest.mark.timeout(500)
NPU = Path(omni_kernels.__file__).parent / "backends" / "npu"


@dataclass(frozen=True)
class Fault:
    """A mutation of a kernel's source, or of the twin of a torch_npu op, and the gates that must tell."""

    op: str
    gates: Sequence[str]
    file: str = ""
    right: str = ""
    wrong: str = ""
    twin: str = ""


FAULTS = {
    "another output of the call": Fault(
        "rms_norm", ["meta", "twin"], "rms_norm.py", "weight, eps)[0]", "weight, eps)[1]"
    ),
    "outputs swapped": Fault(
        "moe_permute", ["meta", "twin"], "moe_permute.py", ", source, sizes[:num_slots]", ", sizes[:num_slots], source"
    ),
    "outputs of one shape swapped": Fault(
        "add_rms_norm", ["twin"], "rms_norm.py", "return normed, total", "return total, normed"
    ),
    "wrong dtype": Fault(
        "moe_combine", ["meta", "twin"], "moe_permute.py", "return combined", "return combined.float()"
    ),
    "a tensor on the wrong device": Fault(
        "grouped_matmul",
        ["meta"],
        "grouped_matmul.py",
        "behind = torch.arange(len(x), device=x.device)",
        "behind = torch.arange(len(x))",
    ),
    "an argument of the wrong type": Fault(
        "rotary", ["meta", "twin"], "rotary.py", '"interleave" if interleaved else "half"', "interleaved"
    ),
    "an unknown keyword": Fault(
        "swiglu", ["meta", "twin"], "swiglu.py", "npu_swiglu(gate_up, dim=-1)", "npu_swiglu(gate_up, axis=-1)"
    ),
    "the other half is activated": Fault(
        "swiglu_quant", ["twin"], "swiglu.py", "activate_left=True", "activate_left=False"
    ),
    "cosine for sine": Fault("rotary", ["twin"], "rotary.py", "_spread(sin, interleaved)", "_spread(cos, interleaved)"),
    "counts taken for running totals": Fault(
        "grouped_matmul", ["twin"], "grouped_matmul.py", "1 if counts_rows else 0", "0"
    ),
    "rows behind the groups left undefined": Fault(
        "grouped_matmul", ["twin"], "grouped_matmul.py", "torch.masked_fill(result, behind.unsqueeze(1), 0)", "result"
    ),
    "group worth of one expert": Fault("moe_gate", ["twin"], "moe_gate.py", "0 if bias is None else 1", "0"),
    "index along rows, not columns": Fault(
        "moe_combine", ["twin"], "moe_permute.py", "pair % top_k * tokens + pair // top_k", "pair"
    ),
    "one token less": Fault("indexer_top_k", ["twin"], "sparse_attention.py", "=seq_lens.to", "=(seq_lens - 1).to"),
    "a dtype the wheels do not document": Fault(
        "dynamic_quant", ["twin"], "quant.py", "x.dtype is torch.float32", "x.dtype is torch.float64"
    ),
    "a mask without its mode": Fault(
        "mla_attention", ["twin"], "mla_attention.py", "sparse_mode=sparse_mode,", "sparse_mode=0,"
    ),
    "an argument written to": Fault(
        "rms_norm", ["twin"], "rms_norm.py", "npu_rms_norm(x.contiguous(), weight", "npu_rms_norm(x.add_(1), weight"
    ),
    "a wrong twin of a norm": Fault("add_rms_norm", ["twin"], twin="npu_add_rms_norm"),
    "a wrong twin of a matrix product": Fault("grouped_matmul_w8a8", ["twin"], twin="npu_grouped_matmul"),
    "a wrong twin of attention": Fault("paged_attention", ["twin"], twin="npu_fused_infer_attention_score"),
}


@pytest.fixture(scope="module")
def answers(wheel_texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    mutants = []
    for name, fault in FAULTS.items():
        path = ""
        if fault.file:
            mutated = tmp_path_factory.mktemp("mutant") / fault.file
            mutated.write_text((NPU / fault.file).read_text().replace(fault.right, fault.wrong))
            path = str(mutated)
        mutants.append({"name": name, "op": fault.op, "file": path, "twin": fault.twin})
    return trials(wheel_texts, mutants)


def test_every_kernel_keeps_the_contract(wheel_texts: dict[str, Path], answers: dict[str, dict[str, Any]]) -> None:
    found = rows(lint_tree(wheel_texts), answers)
    assert {name: row for name, row in found.items() if not row.ok} == {}
    assert len(found) > 20


def test_every_call_is_run_by_a_sample(wheel_texts: dict[str, Path], answers: dict[str, dict[str, Any]]) -> None:
    assert never_run(lint_tree(wheel_texts), answers, NPU) == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_told(name: str, answers: dict[str, dict[str, Any]]) -> None:
    fault = FAULTS[name]
    assert not fault.file or fault.right in (NPU / fault.file).read_text(), "the source has changed; so must the fault"
    mutant = answers[list(answers)[-1]]["mutants"][name]
    told = [gate for gate in ("meta", "twin") if mutant[gate]["failures"]]
    assert told == fault.gates


def test_the_trials_leave_nothing_behind(answers: dict[str, dict[str, Any]]) -> None:
    assert "torch_npu" not in sys.modules
