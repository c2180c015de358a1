"""scripts/setup.py: never a CUDA torch unasked, nothing done twice, no index address in any file."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("omni_setup_script", ROOT / "scripts" / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("version", "requires", "is_cpu"),
    [
        pytest.param("2.13.0+cpu", [], True, id="cpu build"),
        pytest.param("2.13.0", ["filelock", "sympy"], True, id="plain build without CUDA, as on macOS"),
        pytest.param("2.13.0", ["filelock", 'nvidia-cublas; platform_system == "Linux"'], False, id="default on Linux"),
        pytest.param("2.13.0", ["cuda-bindings<14"], False, id="CUDA bindings"),
        pytest.param("2.13.0+cu130", [], False, id="CUDA build"),
        pytest.param("2.13.0+rocm7.1", [], False, id="ROCm build"),
    ],
)
def test_only_a_cpu_torch_is_installed_unasked(setup, version, requires, is_cpu):
    metadata = {"version": version, "requires_dist": requires}
    if is_cpu:
        setup.refuse_cuda_build(metadata)
        return
    with pytest.raises(setup.SetupFailed, match="make setup DEVICE=cuda"):
        setup.refuse_cuda_build(metadata)


@pytest.fixture
def steps_run(setup, tmp_path, monkeypatch):
    """`set_up` with an environment elsewhere and steps that only record their names."""
    ran: list[str] = []
    monkeypatch.setattr(setup, "VENV", tmp_path)
    monkeypatch.setattr(setup, "PYTHON", tmp_path / "python")
    monkeypatch.setattr(setup, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(setup, "make_environment", lambda: (tmp_path.mkdir(exist_ok=True), setup.PYTHON.touch()))
    for name in ("install_torch", "install_engine"):
        monkeypatch.setattr(setup, name, lambda device, name=name: ran.append(name))
    for name in ("install_requirements", "install_packages"):
        monkeypatch.setattr(setup, name, lambda name=name: ran.append(name))
    return ran


def test_second_call_does_nothing(setup, steps_run):
    setup.set_up("cpu")
    assert steps_run == ["install_torch", "install_requirements", "install_engine", "install_packages"]
    steps_run.clear()
    setup.set_up("cpu")
    assert steps_run == []


def test_an_environment_keeps_its_device(setup, steps_run):
    """`make run` after `make setup DEVICE=cuda` must not put the CPU's engine over the one for CUDA."""
    setup.set_up("cuda")
    steps_run.clear()
    setup.set_up(None)
    assert steps_run == []


def test_interrupted_setup_goes_on_where_it_stopped(setup, steps_run, monkeypatch):
    def fails() -> None:
        raise setup.SetupFailed("no network")

    with monkeypatch.context() as broken, pytest.raises(setup.SetupFailed):
        broken.setattr(setup, "install_requirements", fails)
        setup.set_up("cpu")
    assert steps_run == ["install_torch"]
    steps_run.clear()
    setup.set_up("cpu")
    assert steps_run == ["install_requirements", "install_engine", "install_packages"]


def test_environment_copied_from_elsewhere_is_made_anew(setup, steps_run):
    setup.set_up("cpu")
    setup.STAMP.write_text(json.dumps(json.loads(setup.STAMP.read_text()) | {"root": "/elsewhere"}))
    steps_run.clear()
    setup.set_up("cpu")
    assert len(steps_run) == 4


def test_every_package_is_installed(setup):
    folders = {str(folder.relative_to(ROOT)) for folder in setup.package_folders()}
    assert folders >= {"proto", "cli", "libs/common", "libs/engine", "services/proxy", "services/kvstore"}


def test_pins_are_plain_versions():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert pins
    assert not [pin for pin in pins if "==" not in pin or "/" in pin or "+" in pin or pin.startswith("-")]


def test_no_file_names_a_package_index():
    files = [
        ROOT / "constraints.txt",
        ROOT / "Makefile",
        ROOT / "scripts" / "setup.py",
        *ROOT.glob("requirements/*.txt"),
    ]
    assert not [file.name for file in files if "://" in file.read_text() or "index-url=" in file.read_text()]
