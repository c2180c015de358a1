"""A Compose project of its own for tests: unique name, free port, always taken down with its volumes."""

import json
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD_TIMEOUT_S = 1500.0
COMMAND_TIMEOUT_S = 300.0
POLL_S = 0.5
LOCAL_BASE = "omni-base:local"


def compose_command() -> list[str] | None:
    """The Compose of this machine, v2 or 1.29; None without one."""
    if shutil.which("docker") and _succeeds(["docker", "compose", "version"]):
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


def missing_engine() -> str | None:
    """Why no container can be run here; None where one can."""
    if not shutil.which("docker"):
        return "no container engine: there is no docker command"
    if not _succeeds(["docker", "info"]):
        return "no container engine: `docker info` fails"
    return None if compose_command() else "neither `docker compose` nor docker-compose is installed"


def _succeeds(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def eventually(what: str, check: Callable[[], Any], timeout_s: float) -> Any:
    """The first true answer of `check`; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (answer := check()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(POLL_S)
    return answer


def docker(*arguments: str) -> str:
    """Output of a docker command that must succeed."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"docker {arguments[0]}: {done.stderr.strip()}"
    return done.stdout


class Project:
    """Containers of docker-compose.yml. Where this machine has the local base image, it is what is built upon."""

    def __init__(self, environ: Mapping[str, str], arguments: Sequence[str] = ()) -> None:
        command = compose_command()
        assert command is not None
        self.name = f"omnitest{uuid.uuid4().hex[:8]}"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        local = _succeeds(["docker", "image", "inspect", LOCAL_BASE])
        files = ["docker-compose.yml", *(["docker-compose.local.yml"] if local else [])]
        self._command = [*command, "-p", self.name, *(part for f in files for part in ("-f", f)), *arguments]
        # The classic builder is what Compose 1.29 falls back to; v2 brings its own.
        self._environ = {**os.environ, "OMNI_PORT": str(self.port), **environ}
        if local:
            self._environ.setdefault("BASE_IMAGE", LOCAL_BASE)

    def run(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Standard output of a Compose command that must succeed."""
        done = subprocess.run(
            [*self._command, *arguments],
            cwd=ROOT,
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"compose {arguments[0]}: {(done.stdout + done.stderr)[-3000:]}"
        return done.stdout

    def container(self, service: str) -> dict[str, Any]:
        """`docker inspect` of a service's container."""
        labels = {"project": self.name, "service": service}
        filters = [part for k, v in labels.items() for part in ("--filter", f"label=com.docker.compose.{k}={v}")]
        identifier = docker("ps", "--all", "--quiet", *filters).strip()
        assert identifier, f"{service} has no container"
        found: dict[str, Any] = json.loads(docker("inspect", identifier))[0]
        return found

    def health(self, service: str) -> str:
        return str(self.container(service)["State"]["Health"]["Status"])

    def logs(self) -> str:
        """The end of every container's log, for the message of a failure."""
        return self.run("logs", "--tail", "15", "--no-color")

    def down(self) -> None:
        self.run("down", "-v", "--remove-orphans", "--timeout", "40")
