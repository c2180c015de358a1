"""Processes of a run, each on a core of its own, and the CPU time they took."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

HOST = "127.0.0.1"
_BENCH = Path(__file__).parents[1]
_READY_S = 60.0
_STOP_S = 10.0
_START_AND_END_S = 30.0


class Broken(Exception):
    """A process ended, did not answer, or answered what must not be counted."""


@dataclass(frozen=True, slots=True)
class Cores:
    """Numbers of three cores. With fewer than three the processes share, and the report shows how full they were."""

    server: int
    worker: int
    client: int


def cores_of(text: str) -> Cores:
    """`server,worker,client`, or the last three this process may use."""
    allowed = sorted(os.sched_getaffinity(0))
    chosen = [int(part) for part in text.split(",")] if text else (allowed * 3)[-3:]
    return Cores(*chosen)


class Started:
    """One process and all its threads on one core."""

    def __init__(self, name: str, module: str, arguments: Sequence[str], core: int, log: Path, **options: Any) -> None:
        self.name = name
        self._log = log
        environment = {k: v for k, v in os.environ.items() if not k.startswith("OMNI_")}
        environment["PYTHONPATH"] = os.pathsep.join([str(_BENCH), *filter(None, [environment.get("PYTHONPATH")])])
        with log.open("wb") as file:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=environment | options.get("environment", {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if options.get("talks") else file,
                stderr=file,
                text=True,
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),
                process_group=0,
            )

    def tell(self, message: object) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(message))
        self.popen.stdin.close()

    def cpu_s(self) -> float:
        times = psutil.Process(self.popen.pid).cpu_times()
        return float(times.user + times.system)

    def check(self) -> None:
        if (code := self.popen.poll()) is not None:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise Broken(f"{self.name} ended with code {code}\n{tail}")

    def stop(self) -> None:
        self.popen.terminate()
        try:
            self.popen.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()


@contextmanager
def started(*arguments: Any, **options: Any) -> Iterator[Started]:
    """A process for as long as the block runs; arguments as of `Started`."""
    process = Started(*arguments, **options)
    try:
        yield process
    finally:
        process.stop()


def wait_ready(port: int, processes: Sequence[Started]) -> None:
    """Until `/ready` answers 200.

    Raises:
        Broken: a process ended, or it took too long.
    """
    give_up = time.monotonic() + _READY_S
    while time.monotonic() < give_up:
        for process in processes:
            process.check()
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/ready", timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise Broken("the server was not ready in time")


@dataclass(frozen=True, slots=True)
class Marks:
    """CPU seconds by process name, and of the whole machine, at one instant."""

    at_s: float
    cpu_s: Mapping[str, float]
    machine_s: float


def marks_of(processes: Sequence[Started]) -> Marks:
    times = psutil.cpu_times()
    busy = times.user + times.nice + times.system + times.irq + times.softirq
    return Marks(time.perf_counter(), {p.name: p.cpu_s() for p in processes}, busy)


def converse(
    client: Started, duties: Mapping[str, Any], others: Sequence[Started], on_mark: Callable[[str], None]
) -> tuple[Marks, Marks, dict[str, Any]]:
    """Give a load process its duties; CPU time at its two marks, and what it saw.

    Raises:
        Broken: it failed or ended early.
    """
    limit_s = duties["warm_s"] + duties["measure_s"] + _START_AND_END_S
    watchdog = threading.Timer(limit_s, client.popen.kill)
    watchdog.start()
    marks: list[Marks] = []
    result: dict[str, Any] = {"error": "the load process ended early"}
    try:
        client.tell(duties)
        assert client.popen.stdout is not None
        for line in client.popen.stdout:
            message = json.loads(line)
            if "mark" in message:
                on_mark(message["mark"])
                marks.append(marks_of([client, *others]))
            else:
                result = message
    finally:
        watchdog.cancel()
    if "error" in result or len(marks) != 2:
        raise Broken(result.get("error", "the load process ended early"))
    return marks[0], marks[1], result
