"""Runs systems over fleets, loads and seeds, in several processes."""

import gc
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tracereplay.trace import Request, read_trace

from fleetsim.outcome import Outcome, outcome_of
from fleetsim.simulation import Scene, simulate
from fleetsim.systems import SYSTEMS

ATTAINED = 0.9
"""Share of requests that must keep the promise for a load to count as served; DistServe's (Zhong et al. 2024)."""
KNEE_SYSTEMS = ("least_loaded", "least_uncached_tokens", "weighted_scorers", "earliest_batch")
_SPREAD_S = 3.0
_trace: list[Request] = []


@dataclass(frozen=True, slots=True)
class Task:
    """One run; `speed`: the trace's requests arrive so many times as fast."""

    system: str
    scene: Scene
    speed: float


@dataclass(frozen=True, slots=True)
class Level:
    """Outcomes by system, one per seed, of one fleet under one load."""

    title: str
    scene: Scene
    speed: float
    outcomes: Mapping[str, Sequence[Outcome]]

    def median(self, system: str, figure: Callable[[Outcome], float]) -> float:
        return statistics.median(map(figure, self.outcomes[system]))

    def spread(self, system: str, figure: Callable[[Outcome], float]) -> tuple[float, float]:
        values = [figure(outcome) for outcome in self.outcomes[system]]
        return min(values), max(values)


class Runner:
    """`with Runner(path, limit, jobs) as runner`: processes that hold the trace."""

    def __init__(self, path: Path, limit: int | None, jobs: int) -> None:
        self._pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _load, (path, limit))

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, tasks: Sequence[Task]) -> list[Outcome]:
        """One after another says on stderr that it is done: all of them may take an hour."""
        outcomes = []
        for number, (task, outcome) in enumerate(zip(tasks, self._pool.map(_run, tasks), strict=True), 1):
            outcomes.append(outcome)
            title = f"{task.scene.title} at {task.speed:g}x, {task.system}, seed {task.scene.seed}"
            print(f"{number}/{len(tasks)}  {title}", file=sys.stderr, flush=True)
        return outcomes

    def levels(self, scene: Scene, speeds: Mapping[str, float], systems: Sequence[str], seeds: int) -> list[Level]:
        """`speeds` by the level's title. A seed means the same arrivals and noise for every system."""
        tasks = [
            Task(system, replace(scene, seed=seed), speed)
            for speed in speeds.values()
            for system in systems
            for seed in range(seeds)
        ]
        outcomes = iter(self.run(tasks))
        return [
            Level(title, scene, speed, {system: [next(outcomes) for _ in range(seeds)] for system in systems})
            for title, speed in speeds.items()
        ]

    def sweep(self, scene: Scene, systems: Sequence[str], speeds: Sequence[float]) -> Mapping[str, list[float]]:
        """Share of requests that kept the promise, by system and speed, under one seed."""
        outcomes = iter(self.run([Task(system, scene, speed) for system in systems for speed in speeds]))
        name = scene.promise.name
        return {system: [next(outcomes).kept[name] for _ in speeds] for system in systems}


def served_speed(speeds: Sequence[float], kept: Sequence[float], share: float = ATTAINED) -> float:
    """The highest speed up to which `share` of requests keep the promise, between the two that bracket it.

    The first or last of `speeds` where it is outside of them.
    """
    for (slow, more), (fast, less) in zip(
        zip(speeds, kept, strict=True), zip(speeds[1:], kept[1:], strict=True), strict=False
    ):
        if more >= share > less:
            return slow + (fast - slow) * (more - share) / (more - less)
    return speeds[0] if kept[0] < share else speeds[-1]


def _load(path: Path, limit: int | None) -> None:
    gc.disable()
    _trace.extend(read_trace(path, limit))


def _run(task: Task) -> Outcome:
    requests = [replace(request, at_s=request.at_s / task.speed) for request in _trace]
    scene = replace(task.scene, spread_s=_SPREAD_S / task.speed)
    outcome = outcome_of(simulate(scene, SYSTEMS[task.system], requests), scene.promise)
    gc.collect()
    return outcome
