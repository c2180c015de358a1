"""What this machine has: cores, memory, ports, and who holds a port."""

import errno
import os
import random
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

from omni_cli.errors import InvalidOptions, PortTaken
from omni_cli.plan import Machine

# Below the range from which Linux picks ports for outgoing connections: an engine binds its port half a minute
# after it was planned, and a connection opened in between must not take it.
FIRST_PORT, LAST_PORT = 20_000, 32_000


def read_machine() -> Machine:
    """Cores this process may use and memory that is available now."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return Machine(tuple(sorted(cores)), psutil.virtual_memory().available)


def is_port_free(port: int) -> bool:
    """Whether a server could listen there, on 127.0.0.1, now."""
    return _obstacle(port, "127.0.0.1") is None


def _obstacle(port: int, host: str) -> OSError | None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def free_ports(reserved: Collection[int] = ()) -> Iterator[int]:
    """Free ports from a random place on, skipping `reserved` (ports of stacks that have not bound them yet).

    Raises:
        InvalidOptions: every port of the range is taken.
    """
    width = LAST_PORT - FIRST_PORT
    first = random.randrange(width)
    for step in range(width):
        port = FIRST_PORT + (first + step) % width
        if port not in reserved and is_port_free(port):
            yield port
    raise InvalidOptions(f"no free port between {FIRST_PORT} and {LAST_PORT}")


def port_holder(port: int) -> str:
    """Who listens on a port, as far as this user may know."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return "another process"
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            try:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
            except psutil.NoSuchProcess:
                break
    return "another process"


def require_free(host: str, port: int) -> None:
    """Raises PortTaken, naming the holder, or InvalidOptions with another reason, where nothing could listen."""
    obstacle = _obstacle(port, host)
    if obstacle is None:
        return
    if obstacle.errno == errno.EADDRINUSE:
        raise PortTaken(f"port {port} on {host} is in use by {port_holder(port)}; choose another with --port")
    raise InvalidOptions(f"cannot listen on --host {host} --port {port}: {obstacle.strerror}")


def find_root(start: Path) -> Path:
    """The checkout around `start`: the nearest folder that holds `cli/pyproject.toml` or `.omni`; else `start`."""
    for folder in (start, *start.parents):
        if (folder / "cli" / "pyproject.toml").is_file() or (folder / ".omni").is_dir():
            return folder
    return start
