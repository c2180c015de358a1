import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from project import BUILD_TIMEOUT_S, Project, eventually, missing_engine

START_TIMEOUT_S = 420.0


@contextmanager
def started(
    services: Sequence[str], environ: Mapping[str, str] | None = None, arguments: Sequence[str] = ()
) -> Iterator[Project]:
    """`services` built, up and healthy; gone afterwards, with their volumes."""
    if reason := missing_engine():
        pytest.skip(reason)
    project = Project(environ or {}, arguments)
    try:
        project.run("build", *services, timeout_s=BUILD_TIMEOUT_S)
        project.run("up", "-d", "--no-build", *services, timeout_s=START_TIMEOUT_S)
        try:
            for service in services:
                eventually(f"{service} is healthy", lambda s=service: project.health(s) == "healthy", START_TIMEOUT_S)
        except AssertionError as failure:
            raise AssertionError(f"{failure}\n{project.logs()}") from None
        yield project
    finally:
        project.down()


@pytest.fixture(scope="module")
def stack() -> Iterator[Project]:
    """Everything `docker compose up` starts, with real engines."""
    with started(("redis", "kvstore", "placement", "prefill", "decode", "proxy")) as project:
        yield project


@pytest.fixture(scope="module")
def simulated() -> Iterator[Project]:
    """The same with simulated engines."""
    services = ("redis", "kvstore", "placement", "prefill-sim", "decode-sim", "proxy")
    with started(services, arguments=("--profile", "sim")) as project:
        yield project
