"""A redis-server of the benchmark's own, and what it says of itself."""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis
from sidebyside.child import terminate
from sidebyside.ports import free_port

from omni_common.errors import FailedPrecondition
from omni_kvstore.embedded import executable

_START_S = 10.0
_STOP_S = 10.0


class NoRedis(Exception):
    """No redis-server was found, or it did not start."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Totals since the start, or what lies between two of them: calls and microseconds by command, CPU seconds.

    `calls` has the commands that scripts call, too. `used_bytes` is the memory of the data.
    """

    calls: Mapping[str, int]
    micros: Mapping[str, float]
    cpu_s: float
    used_bytes: int

    def since(self, before: "Reading") -> "Reading":
        calls = {name: count - before.calls.get(name, 0) for name, count in self.calls.items() if name != "info"}
        micros = {name: us - before.micros.get(name, 0.0) for name, us in self.micros.items() if name != "info"}
        return Reading(
            {name: count for name, count in calls.items() if count},
            {name: us for name, us in micros.items() if us},
            self.cpu_s - before.cpu_s,
            self.used_bytes - before.used_bytes,
        )


@dataclass(frozen=True, slots=True)
class RedisServer:
    """A server without persistence on 127.0.0.1."""

    port: int
    pid: int
    version: str
    client: redis.Redis

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def read(self) -> Reading:
        stats = self.client.info("commandstats")
        cpu, memory = self.client.info("cpu"), self.client.info("memory")
        commands = {name.removeprefix("cmdstat_").lower(): row for name, row in stats.items()}
        return Reading(
            {name: int(row["calls"]) for name, row in commands.items()},
            {name: float(row["usec"]) for name, row in commands.items()},
            float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"]),
            int(memory["used_memory"]),
        )


def program() -> str:
    """The redis-server on PATH, else the one of the wheel that kvstore embeds."""
    try:
        return shutil.which("redis-server") or shutil.which("valkey-server") or executable()
    except FailedPrecondition as error:
        raise NoRedis(error.message) from None


@contextmanager
def redis_server() -> Iterator[RedisServer]:
    """A server for as long as the block runs."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="omni-bench-redis-") as folder:
        command = [program(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen([*command, "--dir", folder], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        client = redis.Redis(port=port, protocol=2, socket_timeout=60)
        try:
            version = _answer(process, client)
            yield RedisServer(port, process.pid, version, client)
        finally:
            client.close()
            terminate(process, _STOP_S)


def _answer(process: "subprocess.Popen[bytes]", client: redis.Redis) -> str:
    end_s = time.monotonic() + _START_S
    while time.monotonic() < end_s and process.poll() is None:
        try:
            return str(client.info("server")["redis_version"])
        except redis.ConnectionError:
            time.sleep(0.02)
    raise NoRedis("redis-server did not start")
