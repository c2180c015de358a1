"""What must hold for the repository as a whole."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = sorted(p.parent for p in ROOT.glob("*/pyproject.toml")) + sorted(
    p.parent for p in ROOT.glob("[ls]*/*/pyproject.toml")
)
SERVICES = [p for p in PACKAGES if p.parent.name == "services"]
ENGINES = {"torch", "torch_npu", "vllm"}
"""Comes with the engine that a worker is installed beside; which one is the operator's choice."""


def project_of(package: Path) -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    return project


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


FOLDERS = {project_of(package)["name"]: package for package in PACKAGES}


def declared(package: Path) -> set[str]:
    """Distributions that a package asks for, in extras too, and those that ours among them ask for."""
    project = project_of(package)
    asked = [*project["dependencies"], *(r for rs in project.get("optional-dependencies", {}).values() for r in rs)]
    return set(closure(asked))


def closure(requirements: Iterable[str]) -> Iterator[str]:
    for requirement in requirements:
        found = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement)
        assert found is not None, requirement
        name, extras = normalized(found[1]), (found[2] or "").split(",")
        yield name
        if name in FOLDERS:
            project = project_of(FOLDERS[name])
            offered = project.get("optional-dependencies", {})
            yield from closure(project["dependencies"])
            yield from closure(r for extra in extras for r in offered.get(extra, ()))


def imported(package: Path) -> set[str]:
    """Top-level names that its sources import, the standard library's left out."""
    names = set()
    for source in (package / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names


@cache
def brought_by() -> dict[str, set[str]]:
    """Top-level name -> the distributions that may bring it."""
    return {name: {normalized(d) for d in found} for name, found in packages_distributions().items()}


def brings(name: str) -> set[str]:
    if name == "omni":
        return {"omni-proto"}
    return {normalized(name)} if name.startswith("omni_") else brought_by().get(name, {normalized(name)})


def test_stubs_are_current() -> None:
    done = subprocess.run([sys.executable, "proto/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_package_is_whole(package: Path) -> None:
    content = tomllib.loads((package / "pyproject.toml").read_text())
    project, version_file = content["project"], package / content["tool"]["hatch"]["version"]["path"]
    version = re.search(r'__version__ = "(.+)"', version_file.read_text())
    assert version is not None
    assert f"## {version[1]}" in (package / "CHANGELOG.md").read_text()
    assert (package / "README.md").read_text().startswith(f"# {project['name']}")
    assert (package / "LICENSE").read_text() == (ROOT / "LICENSE").read_text(), "every wheel carries the licence"
    between = [d for d in project["dependencies"] if d.startswith("omni-")]
    assert all(">=" in d and "<" in d for d in between), "packages depend on ranges of each other"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_package_declares_what_it_imports(package: Path) -> None:
    asked = declared(package) | {project_of(package)["name"]}
    assert {name for name in imported(package) - ENGINES if not brings(name) & asked} == set()


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_package_is_typed_where_it_is_installed(package: Path) -> None:
    """Type checkers look for the mark in each package, and in those inside of the namespace `omni`."""
    roots = [p for p in (package / "src").glob("*") if p.name != "omni"]
    roots += [p for p in (package / "src/omni").glob("*") if any(p.rglob("*.py"))]
    assert roots and [p for p in roots if p.is_dir() and not (p / "py.typed").exists()] == []


def test_contracts_ask_for_the_runtimes_that_their_stubs_accept() -> None:
    """Generated code refuses to be imported beside an older runtime."""
    lowest = dict(requirement.split(">=") for requirement in project_of(ROOT / "proto")["dependencies"])
    stubs = "".join(path.read_text() for path in sorted((ROOT / "proto/src/omni").rglob("*_pb2*.py")))
    assert set(re.findall(r"GRPC_GENERATED_VERSION = '(.+)'", stubs)) == {lowest["grpcio"]}
    messages = set(re.findall(r"ValidateProtobufRuntimeVersion\(\s*[\w.]+,\s*(\d+),\s*(\d+),\s*(\d+),", stubs))
    assert {".".join(version) for version in messages} == {lowest["protobuf"]}


@pytest.mark.parametrize("service", SERVICES, ids=lambda p: p.name)
def test_every_service_can_be_deployed_alone(service: Path) -> None:
    dockerfile = (service / "Dockerfile").read_text()
    assert "ARG BASE_IMAGE" in dockerfile
    assert re.search(r"^USER (?!root)", dockerfile, re.M)
    assert (service / "src" / f"omni_{service.name}" / "__main__.py").exists()


@pytest.mark.parametrize("service", SERVICES, ids=lambda p: p.name)
def test_every_service_starts_where_nothing_can_be_written(service: Path) -> None:
    """Containers' roots are read-only: compiled loops that cannot be kept on disk are compiled anew."""
    program = f"""
import importlib
from numba.core.caching import CacheImpl
CacheImpl._locator_classes = []
importlib.import_module("omni_{service.name}.app")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_the_services_named_are_there() -> None:
    assert {s.name for s in SERVICES} == {"proxy", "prefill", "decode", "kvstore", "placement"}
