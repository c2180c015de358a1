"""A running stack and its owner: start every process, wait until healthy, restart what dies, stop everything."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omni_cli import processes
from omni_cli.errors import StartFailed
from omni_cli.plan import StackPlan
from omni_cli.probes import Health, Phase, fleet_seen, probe, reachable
from omni_cli.processes import Child
from omni_cli.progress import Progress, Row
from omni_cli.restarts import RestartPolicy
from omni_cli.state import ProcessRecord, StackState, StateFiles

PROBE_INTERVAL_S = 0.4
WATCH_INTERVAL_S = 0.25


@dataclass(frozen=True, slots=True)
class Death:
    """A process ended on its own. `restart_in_s` is None if it stays down."""

    name: str
    exit_code: int
    log_path: Path
    restart_in_s: float | None


@dataclass(slots=True)
class _Watched:
    deaths: list[float] = field(default_factory=list)
    restart_at: float | None = None
    is_down: bool = False


class Stack:
    """Owns the processes of one plan from `start` to `stop` or `leave`."""

    def __init__(
        self, plan: StackPlan, files: StateFiles, environ: Mapping[str, str], cwd: Path, *, supervised: bool
    ) -> None:
        self.plan = plan
        self._files = files
        self._environ = environ
        self._cwd = cwd
        self._children: dict[str, Child] = {}
        self._ready_after: dict[str, float] = {}
        self._has_answered: set[str] = set()
        self.is_healthy = False
        supervisor = processes.own_record() if supervised else None
        scheme, _, address = plan.url.partition("://")
        self.state = StackState(plan.name, f"{scheme}://{reachable(address)}", plan.workers, supervisor=supervisor)

    @property
    def url(self) -> str:
        return self.state.url

    @property
    def records(self) -> list[ProcessRecord]:
        return [child.record for child in self._children.values()]

    def start(self) -> None:
        """Start every process at once; those that need another one wait for it themselves."""
        for spec in self.plan.specs:
            self._start(spec.name)

    async def wait_healthy(self, progress: Progress, timeout_s: float) -> None:
        """Probe until every process is ready and the proxy sees every worker.

        Raises:
            StartFailed: a process ended, or one was not ready in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            healths = await self._probe_all()
            progress.update([self._row(name, health) for name, health in healths.items()])
            for name, child in self._children.items():
                if (code := child.exit_code) is not None:
                    raise StartFailed(name, f"{name} ended with exit code {code} before the stack was healthy")
            late = [name for name, health in healths.items() if health.phase is not Phase.READY]
            if not late and await self._sees_all_workers():
                self.is_healthy = True
                return
            if time.monotonic() > deadline:
                raise StartFailed(late[0] if late else "proxy", self._late_message(late, healths, timeout_s))
            await asyncio.sleep(PROBE_INTERVAL_S)

    async def watch(self, stop: asyncio.Event, policy: RestartPolicy, report: Callable[[Death], None]) -> None:
        """Until `stop` is set: report every process that ends and start it again as the policy allows."""
        watched = {name: _Watched() for name in self._children}
        while not stop.is_set():
            for name, entry in watched.items():
                self._look_after(name, entry, policy, report)
            try:
                await asyncio.wait_for(stop.wait(), WATCH_INTERVAL_S)
            except TimeoutError:
                continue

    async def stop(self, timeout_s: float) -> list[str]:
        """Stop everything and forget the stack; returns the names that had to be killed."""
        killed = await processes.stop(self.records, timeout_s)
        for child in self._children.values():
            _ = child.exit_code
        self._files.remove(self.plan.name)
        return killed

    def log_path(self, name: str) -> Path:
        return self._files.logs(self.plan.name) / f"{name}.log"

    def _start(self, name: str, *, again: bool = False) -> None:
        spec = next(spec for spec in self.plan.specs if spec.name == name)
        child = processes.start(spec, self._files.logs(self.plan.name), self._environ, self._cwd, append=again)
        self._children[name] = child
        self.state = self.state.with_process(child.record)
        self._files.save(self.state)

    def _look_after(self, name: str, entry: _Watched, policy: RestartPolicy, report: Callable[[Death], None]) -> None:
        now = time.monotonic()
        child = self._children[name]
        if entry.is_down:
            return
        if entry.restart_at is not None:
            if now >= entry.restart_at:
                entry.restart_at = None
                self._start(name, again=True)
            return
        if (code := child.exit_code) is None:
            return
        entry.deaths = [*entry.deaths, now][-policy.max_deaths - 1 :]
        delay = policy.delay_s(entry.deaths, now)
        entry.is_down, entry.restart_at = delay is None, None if delay is None else now + delay
        report(Death(name, code, child.log_path, delay))

    async def _probe_all(self) -> dict[str, Health]:
        due = {n: c.spec for n, c in self._children.items() if n not in self._ready_after}
        answers = await asyncio.gather(*(probe(spec.probe, spec.address) for spec in due.values()))
        for name, health in zip(due, answers, strict=True):
            if health.phase is Phase.READY:
                self._ready_after[name] = time.monotonic() - self._children[name].started
            elif health.phase is Phase.LOADING:
                self._has_answered.add(name)
        fresh = dict(zip(due, answers, strict=True))
        return {name: self._settled(name, fresh.get(name, Health(Phase.READY))) for name in self._children}

    def _settled(self, name: str, health: Health) -> Health:
        """A server too busy loading to answer in time has not gone back to starting."""
        is_back = health.phase is Phase.STARTING and name in self._has_answered
        return Health(Phase.LOADING, health.detail) if is_back else health

    async def _sees_all_workers(self) -> bool:
        """A first request sent before the last worker is known would run without it."""
        seen = await fleet_seen(self.url)
        return seen is None or len(seen.workers) >= self.plan.workers

    def _row(self, name: str, health: Health) -> Row:
        child = self._children[name]
        phase = health.phase if child.exit_code is None else Phase.DEAD
        seconds = self._ready_after.get(name, time.monotonic() - child.started)
        return Row(name, phase, seconds, child.spec.address, child.spec.cores)

    def _late_message(self, late: list[str], healths: Mapping[str, Health], timeout_s: float) -> str:
        if not late:
            return f"the proxy did not see {self.plan.workers} workers within {timeout_s:.0f} s"
        said = "; ".join(f"{n} {healths[n].phase} {healths[n].detail}".strip() for n in late)
        return f"not ready within {timeout_s:.0f} s: {said} (more time: --timeout-s)"
