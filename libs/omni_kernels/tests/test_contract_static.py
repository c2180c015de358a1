"""The lint of torch_npu calls, and the pinned wheels it reads the schemas from."""

import shutil
import zipfile
from pathlib import Path

import pytest

import omni_kernels
from omni_kernels.contract.lint import lint
from omni_kernels.contract.report import lint_tree
from omni_kernels.contract.schemas import Schemas, read
from omni_kernels.contract.wheels import WHEELS, NoWheel, fetch, unpack, unpacked

pytestmark = pytest.mark.timeout(500)
OLD, NEW = (wheel.version for wheel in WHEELS)
PACKAGE = Path(omni_kernels.__file__).parent


@pytest.fixture(scope="module")
def releases(wheel_texts: dict[str, Path]) -> dict[str, Schemas]:
    return {version: read(folder) for version, folder in wheel_texts.items()}


def test_every_call_in_the_tree_fits_every_release(wheel_texts: dict[str, Path]) -> None:
    report = lint_tree(wheel_texts)
    assert [str(finding) for finding in report.findings] == []
    assert {"npu_rms_norm", "npu_grouped_matmul"} <= {site.op for site in report.sites}


@pytest.mark.parametrize(
    ("call", "problem", "versions"),
    [
        pytest.param("torch_npu.npu_rms_norm(x, gamma=w)", "", [], id="right"),
        pytest.param("torch.ops.npu.npu_rms_norm.default(x, w, 1e-6)", "", [], id="right by torch.ops"),
        pytest.param("torch_npu.npu_rms_norm(x, weight=w)", "no argument 'weight'", [OLD, NEW], id="renamed"),
        pytest.param(
            "torch_npu.npu_rms_norm(self=x, gamma=w)", "no argument 'self'", [OLD, NEW], id="name of the files"
        ),
        pytest.param("torch_npu.npu_rms_norm(x)", "'gamma' is missing", [OLD, NEW], id="missing"),
        pytest.param("torch_npu.npu_rms_norm(x, w, 1e-6, 1)", "takes 3 positional", [OLD, NEW], id="too many"),
        pytest.param("torch_npu.npu_rms_norm(x, w, gamma=w)", "given twice", [OLD, NEW], id="twice"),
        pytest.param("torch_npu.npu_rms_norm(x, w, 'small')", "'epsilon' is float", [OLD, NEW], id="literal"),
        pytest.param("torch_npu.npu_rms_norm(x, None)", "'gamma' is Tensor", [OLD, NEW], id="None"),
        pytest.param("torch.ops.npu.npu_rms_norm(x, weight=w)", "no argument", [OLD, NEW], id="by torch.ops"),
        pytest.param("torch_npu.npu_rms_norms(x, w)", "no such op", [OLD, NEW], id="unknown op"),
        pytest.param("torch_npu._npu_paged_attention(x)", "no such op", [OLD, NEW], id="op without schema"),
        pytest.param("torch_npu.npu_rms_norm(x, **extra)", "cannot be checked", [OLD, NEW], id="keywords unpacked"),
        pytest.param("torch_npu.npu_rms_norm(*extra)", "cannot be checked", [OLD, NEW], id="arguments unpacked"),
        pytest.param("run(torch_npu.npu_rms_norm, x)", "is not called where", [""], id="passed on"),
        pytest.param("getattr(torch_npu, name)(x)", "getattr", [""], id="by name"),
        pytest.param(
            "torch_npu.npu_moe_gating_top_k(x, 2, input_ids=i)", "'input_ids'", [OLD], id="argument of the newer"
        ),
        pytest.param("torch_npu.npu_swiglu_group_quant(x)", "no such op", [OLD], id="op of the newer"),
        pytest.param("torch_npu.npu_moe_distribute_dispatch_teardown()", "no such op", [NEW], id="op of the older"),
    ],
)
def test_lint_tells(call: str, problem: str, versions: list[str], releases: dict[str, Schemas], tmp_path: Path) -> None:
    source = tmp_path / "kernel.py"
    source.write_text(f"import torch\nimport torch_npu\n\n\ndef run(x, w, extra, name):\n    return {call}\n")
    findings = lint([source], releases).findings
    told = [finding.version for finding in findings if problem in finding.problem]
    assert told[: len(versions)] == versions
    assert bool(findings) == bool(versions)
    assert all(finding.line == 6 for finding in findings)


def test_lint_sees_through_another_name_and_refuses_names_taken_out(
    releases: dict[str, Schemas], tmp_path: Path
) -> None:
    source = tmp_path / "kernel.py"
    source.write_text("import torch_npu as n\nfrom torch_npu import npu_rms_norm\nn.npu_rms_norm(1)\n")
    findings = lint([source], releases).findings
    assert {finding.line for finding in findings} == {2, 3}


def test_production_code_does_not_import_the_contract() -> None:
    below = [
        path for part in ("ops", "backends", "vllm", "patterns", "quantize") for path in (PACKAGE / part).rglob("*.py")
    ]
    assert [path.name for path in below if "omni_kernels.contract" in path.read_text()] == []


def test_another_wheel_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / WHEELS[0].file_name
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("torch_npu/_op_plugin_docs.py", "")
    with pytest.raises(NoWheel, match="the index serves another file"):
        unpack(WHEELS[0], file, tmp_path / "texts")
    assert not (tmp_path / "texts").exists()


def test_an_altered_cache_is_refused(wheel_texts: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(wheel_texts[NEW], tmp_path / NEW)
    meta = tmp_path / NEW / "torch_npu/op_plugin/meta/_meta_registrations.py"
    meta.write_text(meta.read_text() + "\n")
    with pytest.raises(NoWheel, match="remove the folder"):
        unpacked(WHEELS[1], tmp_path)


def test_an_index_that_cannot_be_reached_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr("omni_kernels.contract.wheels.checkout", lambda: None)
    with pytest.raises(NoWheel, match="OMNI_ALLOW_NO_WHEELS=1") as refused:
        fetch(WHEELS[0], tmp_path)
    assert WHEELS[0].file_name in str(refused.value)
    assert list(tmp_path.iterdir()) == []
