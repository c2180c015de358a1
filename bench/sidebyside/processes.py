"""Starting, freezing, pinning, accounting and ending the processes of a part."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from sidebyside.child import Broken
from sidebyside.systems import ENGINE_CORE, OTHER_CORE, Command, Part, Placement

_TERM_GRACE_S = 10.0
_KILL_GRACE_S = 5.0


class Running:
    """The processes of one part. Owned by `running`, which ends them."""

    def __init__(self, part: Part, logs: Path, environ: Mapping[str, str]) -> None:
        self.part = part
        self._logs = logs
        self._environ = {k: v for k, v in environ.items() if not k.startswith(("OMNI_", "VLLM_"))}
        self._roots: list[tuple[Command, subprocess.Popen[bytes]]] = []

    def start(self) -> None:
        for command in self.part.commands:
            with self._log_path(command).open("wb") as log:
                popen = subprocess.Popen(
                    command.arguments,
                    env=self._environ | dict(command.environment),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # Not a session of its own: the kernel's autogroups then let a spinning engine core starve the rest.
                    process_group=0,
                )
            self._roots.append((command, popen))

    def check(self) -> None:
        """Raise `Broken` if a process has ended."""
        for command, popen in self._roots:
            if (code := popen.poll()) is not None:
                raise Broken(f"{self.part.name}: {command.name} ended with code {code}\n{self.log_tail(command)}")

    def log_tail(self, command: Command) -> str:
        return "\n".join(self._log_path(command).read_text(errors="replace").splitlines()[-15:])

    def pin(self, placement: Placement) -> None:
        """Workers to their core, every other thread to the other one, engine cores where `placement` says."""
        for command, popen in self._roots:
            for process in _tree(popen.pid):
                cores = _cores_of(_title(process), command.worker_core, placement)
                with suppress(psutil.NoSuchProcess):
                    for thread in process.threads():
                        with suppress(ProcessLookupError):
                            os.sched_setaffinity(thread.id, cores)

    def freeze(self) -> None:
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal_all(signal.SIGCONT)

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds so far by command name; engine cores, workers and their trackers together as `engine`."""
        total: dict[str, float] = {}
        for command, popen in self._roots:
            for process in _tree(popen.pid):
                with suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    name = "engine" if _is_engine(_title(process)) else command.name
                    total[name] = total.get(name, 0.0) + times.user + times.system
        return total

    def stop(self) -> None:
        """End everything, children first seen included; nothing is left when this returns."""
        everyone = [process for _, popen in self._roots for process in _tree(popen.pid)]
        self._signal_all(signal.SIGCONT)
        for _, popen in self._roots:
            with suppress(ProcessLookupError):
                popen.terminate()
        _, alive = psutil.wait_procs(everyone, _TERM_GRACE_S)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, _KILL_GRACE_S)
        for _, popen in self._roots:
            with suppress(ProcessLookupError):  # children of a root that died first
                os.killpg(popen.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                popen.wait(_KILL_GRACE_S)

    def _signal_all(self, number: signal.Signals) -> None:
        for _, popen in self._roots:
            for process in _tree(popen.pid):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def _log_path(self, command: Command) -> Path:
        return self._logs / f"{self.part.name}-{command.name.replace(' ', '-')}.log"


@contextmanager
def running(part: Part, logs: Path, environ: Mapping[str, str]) -> Iterator[Running]:
    """Processes of a part for as long as the block runs."""
    processes = Running(part, logs, environ)
    try:
        processes.start()
        yield processes
    finally:
        processes.stop()


def wait_until(processes: Running, is_ready: Callable[[], bool], deadline_s: float) -> None:
    """Poll until `is_ready()`.

    Raises:
        Broken: a process ended, or `deadline_s` (time.monotonic) passed.
    """
    while not is_ready():
        processes.check()
        if time.monotonic() > deadline_s:
            tails = "\n".join(processes.log_tail(c) for c in processes.part.commands)
            raise Broken(f"{processes.part.name} was not ready in time\n{tails}")
        time.sleep(0.25)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def _cores_of(title: str, worker_core: int | None, placement: Placement) -> set[int]:
    if worker_core is not None and title.startswith("VLLM::Worker"):
        return {worker_core}
    if placement == "free":
        return {ENGINE_CORE, OTHER_CORE}
    is_together = placement == "together" and worker_core is not None and title.startswith("VLLM::EngineCore")
    return {worker_core} if is_together and worker_core is not None else {OTHER_CORE}


def _is_engine(title: str) -> bool:
    return title.startswith(("VLLM::EngineCore", "VLLM::Worker")) or "multiprocessing.resource_tracker" in title
