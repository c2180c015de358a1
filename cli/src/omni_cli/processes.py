"""Starting and stopping the processes of a stack."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from omni_cli.plan import ProcessSpec
from omni_cli.state import ProcessRecord

POLL_S = 0.1
KILL_GRACE_S = 5.0
MIN_WAVE_S = 5.0
# The proxy finishes its streams while the engines still run; the index goes last.
STOP_ORDER: Sequence[frozenset[str]] = (
    frozenset({"proxy"}),
    frozenset({"prefill", "decode"}),
    frozenset({"placement", "kvstore"}),
)


@dataclass(slots=True)
class Child:
    """A process this program started."""

    spec: ProcessSpec
    popen: subprocess.Popen[bytes]
    record: ProcessRecord
    log_path: Path
    started: float

    @property
    def exit_code(self) -> int | None:
        """None while it runs; reaps it when it has ended."""
        return self.popen.poll()


def child_environment(environ: Mapping[str, str], spec: ProcessSpec) -> dict[str, str]:
    """The caller's environment with the plan's settings over it; services refuse OMNI_CLI_* as unknown."""
    inherited = {name: value for name, value in environ.items() if not name.startswith("OMNI_CLI_")}
    return inherited | {"PYTHONUNBUFFERED": "1"} | dict(spec.environment)


def start(spec: ProcessSpec, logs: Path, environ: Mapping[str, str], cwd: Path, *, append: bool = False) -> Child:
    """Start one process in its own process group, its output going to `logs/<name>.log`."""
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"{spec.name}.log"
    with path.open("ab" if append else "wb") as log:
        popen = subprocess.Popen(
            [sys.executable, "-m", spec.module],
            env=child_environment(environ, spec),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # A group of its own keeps Ctrl-C from it. Not a session: the kernel shares the cores evenly between those,
            # and an engine core polls with sched_yield, so in sessions apart it would starve the proxy beside it.
            process_group=0,
        )
    kv_port = next((int(v) for k, v in spec.environment.items() if k.endswith("VLLM__KV_PORT")), None)
    record = ProcessRecord(
        spec.name, popen.pid, _start_time(popen.pid), spec.service, spec.address, spec.probe, spec.metrics_port,
        kv_port, spec.cores,
    )  # fmt: skip
    return Child(spec, popen, record, path, time.monotonic())


def own_record() -> ProcessRecord:
    """This very process, as a stack's supervisor."""
    return ProcessRecord("omni up", os.getpid(), _start_time(os.getpid()))


async def stop(records: Iterable[ProcessRecord], timeout_s: float) -> list[str]:
    """SIGTERM in order, SIGKILL to what is left after `timeout_s` over all; returns the names that were killed.

    A proxy that used all the time up does not take from the engines the few seconds they need; 0 kills at once.
    Children of the recorded processes (engine cores, the embedded Redis) are killed if they outlive their parent.
    """
    remaining = list(records)
    deadline = time.monotonic() + timeout_s
    killed: list[str] = []
    for services in STOP_ORDER:
        wave = [r for r in remaining if r.service in services]
        killed += await _stop_wave(wave, _at_least(deadline, timeout_s))
    rest = [r for r in remaining if not any(r.service in services for services in STOP_ORDER)]
    return killed + await _stop_wave(rest, _at_least(deadline, timeout_s))


async def wait_gone(record: ProcessRecord, timeout_s: float) -> bool:
    """Wait until a process that is not our child has ended; False if it has not in time."""
    deadline = time.monotonic() + timeout_s
    while record.process() is not None:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(POLL_S)
    return True


def _at_least(deadline: float, timeout_s: float) -> float:
    return max(deadline, time.monotonic() + min(MIN_WAVE_S, timeout_s))


async def _stop_wave(records: Sequence[ProcessRecord], deadline: float) -> list[str]:
    found = [(record, process) for record in records if (process := record.process()) is not None]
    descendants = [child for _, process in found for child in _descendants(process)]
    for _, process in found:
        _signal(process, signal.SIGTERM)
    await _wait_dead([process for _, process in found], deadline)
    late = [(record, process) for record, process in found if _is_alive(process)]
    leftovers = [process for _, process in late] + [child for child in descendants if _is_alive(child)]
    for process in leftovers:
        _signal(process, signal.SIGKILL)
    await _wait_dead(leftovers, time.monotonic() + KILL_GRACE_S)
    return [record.name for record, _ in late]


async def _wait_dead(waited: Sequence[psutil.Process], deadline: float) -> None:
    while any(_is_alive(process) for process in waited):
        if time.monotonic() > deadline:
            return
        await asyncio.sleep(POLL_S)


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _is_alive(process: psutil.Process) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            _reap(process.pid)
            return False
        return bool(process.is_running())
    except psutil.NoSuchProcess:
        return False


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return  # another process's child


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _start_time(pid: int) -> float:
    return float(psutil.Process(pid).create_time())
