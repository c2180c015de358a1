"""What goes wrong, when: a seeded plan, and its execution on real processes."""

import asyncio
import os
import random
import signal
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import psutil
from relay import Relay

PAUSE_S = (0.5, 5.0)
DELAY_S = (0.005, 0.1)
DELAYED_S = (2.0, 8.0)
STALL_S = (0.5, 3.0)
WEIGHTS = {"kill": 35, "pause": 40, "delay": 20, "stall": 5}
RARELY = ("placement",)
# `omni up` leaves a process down that died more than five times within ten minutes.
KILLS_PER_WINDOW = 4
WINDOW_S = 600.0


@dataclass(frozen=True, slots=True)
class Fault:
    """`at_s` after the beginning; `amount_s` is how long a pause lasts, or how long each message is delayed."""

    at_s: float
    kind: str
    target: str
    amount_s: float
    lasts_s: float


def plan(seed: int, seconds: float, gap_s: float, processes: Sequence[str], lines: Sequence[str]) -> list[Fault]:
    """Faults about `gap_s` apart; each process is killed at most `KILLS_PER_WINDOW` times in any window."""
    rng = random.Random(seed)
    kills: dict[str, list[float]] = defaultdict(list)
    faults, now = [], rng.uniform(0.5, gap_s)
    while now < seconds:
        kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        target = _target(rng, lines if kind in ("delay", "stall") else processes)
        recent = [at for at in kills[target] if now - at < WINDOW_S]
        if kind == "kill" and len(recent) >= KILLS_PER_WINDOW:
            kind = "pause"
        if kind == "kill":
            kills[target].append(now)
        amount_s, lasts_s = _draw(rng, kind)
        faults.append(Fault(now, kind, target, amount_s, lasts_s))
        now += rng.uniform(0.5, 1.5) * gap_s
    return faults


def _target(rng: random.Random, names: Sequence[str]) -> str:
    """Requests do not depend on some of them; those come up seldom."""
    return rng.choices(names, [0.2 if name in RARELY else 1.0 for name in names])[0]


def _draw(rng: random.Random, kind: str) -> tuple[float, float]:
    match kind:
        case "pause":
            return 0.0, rng.uniform(*PAUSE_S)
        case "delay":
            return rng.uniform(*DELAY_S), rng.uniform(*DELAYED_S)
        case "stall":
            return 0.0, rng.uniform(*STALL_S)
    return 0.0, 0.0


class Victims(Protocol):
    """Processes by name. `may_die` is false where that would leave nobody of a kind."""

    def pid(self, name: str) -> int | None: ...

    def may_die(self, name: str) -> bool: ...


class Execution:
    """Runs a plan; `done` counts what was inflicted as `kind target`. Nothing stays paused or slow after `run`."""

    def __init__(self, faults: Sequence[Fault], victims: Victims, lines: Mapping[str, Relay]) -> None:
        self._faults = faults
        self._victims = victims
        self._lines = lines
        self.done: Counter[str] = Counter()

    async def run(self) -> None:
        began = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as lasting:
            for fault in self._faults:
                await asyncio.sleep(began + fault.at_s - asyncio.get_running_loop().time())
                match fault.kind:
                    case "kill":
                        self._kill(fault)
                    case "pause":
                        lasting.create_task(self._pause(fault))
                    case _:
                        lasting.create_task(self._disturb(fault))

    def _kill(self, fault: Fault) -> None:
        if not self._victims.may_die(fault.target):
            self.done[f"skipped kill {fault.target}"] += 1
            return
        pid = self._victims.pid(fault.target)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.done[f"kill {fault.target}"] += 1

    async def _pause(self, fault: Fault) -> None:
        pid = self._victims.pid(fault.target)
        if pid is None:
            return
        try:
            process = psutil.Process(pid)
            tree = [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        self.done[f"pause {fault.target}"] += 1
        try:
            _signal(tree, signal.SIGSTOP)
            await asyncio.sleep(fault.lasts_s)
        finally:
            _signal(tree, signal.SIGCONT)

    async def _disturb(self, fault: Fault) -> None:
        relay = self._lines[fault.target]
        self.done[f"{fault.kind} {fault.target}"] += 1
        try:
            if fault.kind == "stall":
                relay.stall()
            relay.delay_s = fault.amount_s
            await asyncio.sleep(fault.lasts_s)
        finally:
            relay.delay_s = 0.0
            relay.flow()


def _signal(tree: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
