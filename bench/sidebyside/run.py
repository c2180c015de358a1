"""Starts the parts, alternates the systems in rounds, and collects their points."""

import json
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sidebyside.child import Broken
from sidebyside.measure import Load, Point, measure
from sidebyside.ports import free_port
from sidebyside.processes import Running, running, wait_until
from sidebyside.systems import (
    ENGINE_CORE,
    HOST,
    MODEL,
    SYSTEMS,
    EngineSettings,
    NotAvailable,
    Part,
    Placement,
    Site,
    System,
    vllm_server,
)

ENGINE_BYTES = 3 * 1024**3
START_TIMEOUT_S = 240.0
ENGINES_AT_ONCE = 2
_HTTP_TIMEOUT_S = 60.0
_QUESTION = "What is the capital of France?"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the command line asked for."""

    systems: tuple[str, ...]
    loads: tuple[Load, ...]
    repeats: int
    engine: EngineSettings
    router: Path
    placement: Placement


@dataclass(slots=True)
class Results:
    """Points by system key and load name, one per repeat; and what could not run, with its reason."""

    points: dict[str, dict[str, list[Point]]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    start_s: dict[str, float] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)


def run(wishes: Wishes, say: Say) -> Results:
    """Measure every system that can run here.

    Raises:
        Broken: a system that started did not serve as it must.
    """
    results = Results()
    directory = Path(tempfile.mkdtemp(prefix="omni-bench-"))
    try:
        systems = plan_systems(wishes, directory, results)
        with ExitStack() as stack:
            live = _start(systems, directory, stack, results, say, wishes.placement)
            _check_answers(systems, live, results)
            for repeat in range(wishes.repeats):
                # Every other round runs backwards, so that no system is always the first.
                for system in systems if repeat % 2 == 0 else systems[::-1]:
                    _visit(system, live, wishes, repeat, results, say)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return results


def plan_systems(wishes: Wishes, directory: Path, results: Results) -> list[System]:
    """The systems that can run; reasons for the others go to `results.skipped`."""
    site = Site(wishes.engine, directory, _free_ports(), wishes.router)
    server = vllm_server(site, ENGINE_CORE)
    available = psutil.virtual_memory().available
    systems: list[System] = []
    for key in wishes.systems:
        try:
            system = SYSTEMS[key](site, server)
        except NotAvailable as error:
            results.skipped[key] = str(error)
            continue
        engines = sum(part.engines for part in _parts([*systems, system]))
        if engines * ENGINE_BYTES > available:
            results.skipped[key] = f"{engines} engines do not fit {available / 1024**3:.0f} GiB of free memory"
            continue
        systems.append(system)
        results.titles[key] = system.title
    return systems


def _parts(systems: Sequence[System]) -> list[Part]:
    return list({part.name: part for system in systems for part in system.parts}.values())


def _start(
    systems: Sequence[System], directory: Path, stack: ExitStack, results: Results, say: Say, placement: Placement
) -> dict[str, Running]:
    """Parts in waves of at most two engines; all are pinned, and frozen once the last serves."""
    live: dict[str, Running] = {}
    for wave in _waves(_parts(systems)):
        say(f"starting {', '.join(part.name for part in wave)}")
        begin_s = time.monotonic()
        live |= {part.name: stack.enter_context(running(part, directory, os.environ)) for part in wave}
        for part in wave:
            wait_until(live[part.name], lambda part=part: _is_ready(part), begin_s + START_TIMEOUT_S)  # type: ignore[misc]
            results.start_s[part.name] = time.monotonic() - begin_s
            live[part.name].pin(placement)
            say(f"{part.name} serves after {results.start_s[part.name]:.0f} s")
    for processes in live.values():
        processes.freeze()
    return live


def _waves(parts: Sequence[Part]) -> list[list[Part]]:
    """Loading keeps a core busy; more loads at once than cores make health checks fail."""
    waves: list[list[Part]] = [[]]
    for part in parts:
        if waves[-1] and sum(p.engines for p in waves[-1]) + part.engines > ENGINES_AT_ONCE:
            waves.append([])
        waves[-1].append(part)
    return waves


def _visit(system: System, live: dict[str, Running], wishes: Wishes, repeat: int, results: Results, say: Say) -> None:
    """All loads on one system while the others stand still."""
    parts = [live[part.name] for part in system.parts]
    for part in parts:
        part.thaw()
        wait_until(part, lambda p=part.part: _is_ready(p), time.monotonic() + 30)  # type: ignore[misc]
    for part in parts:
        part.pin(wishes.placement)
    for load in wishes.loads:
        seed = f"{system.key}/{load.name}/{repeat}"
        point = measure(load, system.port, wishes.engine.model_dir, seed, parts)
        results.points.setdefault(system.key, {}).setdefault(load.name, []).append(point)
        say(f"round {repeat + 1} {system.key:2} {load.name:10} {_one_line(point)}")
    for part in parts:
        part.check()
        part.freeze()


def _one_line(point: Point) -> str:
    return (
        f"{point.tokens_per_s:5.0f} tok/s, TTFT {point.ttft_ms:.1f}, "
        f"ITL {point.itl_p50_ms:.1f} / {point.itl_p99_ms:.1f} ms, "
        f"CPU {point.serving_cpu_us:.0f} us/token, others {point.foreign_share:.0%}"
    )


def _check_answers(systems: Sequence[System], live: dict[str, Running], results: Results) -> None:
    for system in systems:
        for part in system.parts:
            live[part.name].thaw()
        results.answers[system.key] = _ask(system.port)
        for part in system.parts:
            live[part.name].freeze()


def _ask(port: int) -> str:
    body = {"model": MODEL, "messages": [{"role": "user", "content": _QUESTION}], "max_tokens": 16, "temperature": 0}
    request = urllib.request.Request(
        f"http://{HOST}:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=_HTTP_TIMEOUT_S) as answer:
            content: str = json.load(answer)["choices"][0]["message"]["content"]
    except (OSError, ValueError, LookupError) as error:
        raise Broken(f"port {port} does not answer a chat: {error}") from None
    return content


def _is_ready(part: Part) -> bool:
    """The part's own page says so; Omni's proxy must also see every worker."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{part.port}{part.ready_path}", timeout=5):
            pass
        if not part.workers:
            return True
        with urllib.request.urlopen(f"http://{HOST}:{part.port}/workers", timeout=5) as answer:
            seen = json.load(answer)["workers"]
    except (OSError, ValueError):
        return False
    return len([worker for worker in seen if worker["takes_work"]]) == part.workers


def _free_ports() -> Iterator[int]:
    """Ports free now, each given once."""
    given: set[int] = set()
    while True:
        if (port := free_port()) not in given:
            given.add(port)
            yield port
