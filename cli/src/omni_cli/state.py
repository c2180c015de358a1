"""What is recorded of a stack: `.omni/<name>/state.json`, written whole and renamed, so that a reader never sees half.

.omni/<name>/state.json     processes with their start times, ports, url
.omni/<name>/logs/*.log     one per process
.omni/<name>/redis/         the embedded Redis, where no --redis was given
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from omni_cli.errors import InvalidOptions, NoSuchStack

# Start times are derived from the boot time, which moves a little when the clock is set.
START_TIME_TOLERANCE_S = 2.0
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """A process by pid and start time (seconds since 1970), so that a recycled pid is not taken for it."""

    name: str
    pid: int
    started_at: float
    service: str = ""
    address: str = ""
    probe: str = ""
    metrics_port: int | None = None
    kv_port: int | None = None
    cores: str | None = None

    def process(self) -> psutil.Process | None:
        """The live process this record means; None if it has ended or the pid belongs to another."""
        try:
            found = psutil.Process(self.pid)
            same = abs(found.create_time() - self.started_at) <= START_TIME_TOLERANCE_S
            return found if same and found.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None

    @property
    def ports(self) -> set[int]:
        own = int(self.address.rpartition(":")[2]) if self.address else None
        return {port for port in (own, self.metrics_port, self.kv_port) if port}


@dataclass(frozen=True, slots=True)
class StackState:
    """One stack. `supervisor` is the `omni up` that watches it, None for a detached one."""

    name: str
    url: str
    workers: int
    processes: tuple[ProcessRecord, ...] = ()
    supervisor: ProcessRecord | None = None

    def with_process(self, record: ProcessRecord) -> "StackState":
        """The same with this record in place of the one of its name."""
        by_name = {p.name: p for p in self.processes} | {record.name: record}
        return replace(self, processes=tuple(by_name.values()))

    def live(self) -> list[ProcessRecord]:
        return [p for p in self.processes if p.process() is not None]

    def is_running(self) -> bool:
        return bool(self.live()) or (self.supervisor is not None and self.supervisor.process() is not None)


class StateFiles:
    """The `.omni` folder."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def directory(self, name: str) -> Path:
        """Where a stack's files lie.

        Raises:
            InvalidOptions: the name is not lower-case letters, digits and dashes.
        """
        if not NAME.fullmatch(name):
            raise InvalidOptions(f"--name {name!r}: use up to 40 lower-case letters, digits and dashes")
        return self.home / name

    def logs(self, name: str) -> Path:
        return self.directory(name) / "logs"

    def load(self, name: str) -> StackState:
        """Raises NoSuchStack if nothing readable is recorded."""
        path = self.directory(name) / "state.json"
        try:
            return _from_json(json.loads(path.read_text()))
        except FileNotFoundError:
            known = ", ".join(state.name for state in self.all()) or "none"
            raise NoSuchStack(f"no stack named {name!r} (known: {known})") from None
        except (ValueError, TypeError, KeyError) as error:
            raise NoSuchStack(f"{path} cannot be read ({error}); remove it if its processes are gone") from None

    def save(self, state: StackState) -> None:
        directory = self.directory(state.name)
        directory.mkdir(parents=True, exist_ok=True)
        scratch = directory / f"state.{os.getpid()}.tmp"
        scratch.write_text(json.dumps(asdict(state), indent=2))
        scratch.replace(directory / "state.json")

    def remove(self, name: str) -> None:
        """Forget a stack that has stopped; its logs stay, its Redis and placement data go."""
        directory = self.directory(name)
        (directory / "state.json").unlink(missing_ok=True)
        for data in ("redis", "placement"):
            shutil.rmtree(directory / data, ignore_errors=True)

    def all(self) -> Iterator[StackState]:
        for path in sorted(self.home.glob("*/state.json")):
            try:
                yield _from_json(json.loads(path.read_text()))
            except (OSError, ValueError, TypeError, KeyError):
                continue  # being replaced, or not ours; `load` by name says why

    def logged(self) -> list[str]:
        """Names of stacks that have logs, running or not."""
        return sorted(path.parent.name for path in self.home.glob("*/logs"))

    def reserved_ports(self) -> set[int]:
        """Ports of live stacks, bound or not yet."""
        return {port for state in self.all() for record in state.live() for port in record.ports}


def _from_json(content: dict[str, Any]) -> StackState:
    processes = tuple(ProcessRecord(**record) for record in content.pop("processes"))
    supervisor = content.pop("supervisor")
    return StackState(**content, processes=processes, supervisor=ProcessRecord(**supervisor) if supervisor else None)
