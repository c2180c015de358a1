"""What must hold for the repository as a whole."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = sorted(p.parent for p in ROOT.glob("*/pyproject.toml")) + sorted(
    p.parent for p in ROOT.glob("[ls]*/*/pyproject.toml")
)
SERVICES = [p for p in PACKAGES if p.parent.name == "services"]


def test_stubs_are_current() -> None:
    done = subprocess.run([sys.executable, "proto/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_package_is_whole(package: Path) -> None:
    project = tomllib.loads((package / "pyproject.toml").read_text())
    version_file = package / project["tool"]["hatch"]["version"]["path"]
    version = re.search(r'__version__ = "(.+)"', version_file.read_text())
    assert version is not None
    assert f"## {version[1]}" in (package / "CHANGELOG.md").read_text()
    assert (package / "README.md").read_text().startswith(f"# {project['project']['name']}")
    between = [d for d in project["project"]["dependencies"] if d.startswith("omni-")]
    assert all(">=" in d and "<" in d for d in between), "packages depend on ranges of each other"


@pytest.mark.parametrize("service", SERVICES, ids=lambda p: p.name)
def test_every_service_can_be_deployed_alone(service: Path) -> None:
    dockerfile = (service / "Dockerfile").read_text()
    assert "ARG BASE_IMAGE" in dockerfile
    assert re.search(r"^USER (?!root)", dockerfile, re.M)
    assert (service / "src" / f"omni_{service.name}" / "__main__.py").exists()


def test_the_services_named_are_there() -> None:
    assert {s.name for s in SERVICES} == {"proxy", "prefill", "decode", "kvstore", "placement"}
