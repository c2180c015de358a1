"""Runs all variants over scenes and seeds, and says what came out: a table, goals, JSON."""

import multiprocessing
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sidebyside.tables import Block

from tracereplay.knowledge import VARIANTS
from tracereplay.replay import Outcome, Replay, Scene
from tracereplay.trace import Request, read_trace

GOAL = 0.98
_ORACLES = ("oracle", "oracle_ahead")
_trace: list[Request] = []


@dataclass(frozen=True, slots=True)
class Source:
    """Which requests are replayed."""

    path: Path
    limit: int | None
    speed: float

    def read(self) -> list[Request]:
        return read_trace(self.path, self.limit, self.speed)


@dataclass(frozen=True, slots=True)
class Case:
    """A scene under its title; `decides` says that the goal is held against it."""

    title: str
    scene: Scene
    decides: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    """Outcomes of one case by variant, one per seed."""

    case: Case
    outcomes: Mapping[str, Sequence[Outcome]]

    def hit_rate(self, variant: str) -> float:
        return statistics.mean(outcome.hit_rate for outcome in self.outcomes[variant])

    @property
    def best_oracle(self) -> str:
        """The oracle with the higher mean hit rate."""
        return max(_ORACLES, key=self.hit_rate)

    def to_oracle(self, variant: str) -> float:
        """Mean hit rate over that of the better oracle."""
        return self.hit_rate(variant) / self.hit_rate(self.best_oracle)

    def spread(self, variant: str) -> tuple[float, float]:
        """Lowest and highest ratio to that oracle under one seed."""
        oracle = self.outcomes[self.best_oracle]
        ratios = [a.hit_rate / b.hit_rate for a, b in zip(self.outcomes[variant], oracle, strict=True)]
        return min(ratios), max(ratios)


def cases_of(scene: Scene, cache_sizes: Sequence[int], extras_at: int | None) -> list[Case]:
    """One per size of the caches; then, at one size, several proxies and events that are later still."""
    cases = [Case(f"{size:,} blocks", replace(scene, cache_blocks=size)) for size in cache_sizes]
    if extras_at is not None:
        base = replace(scene, cache_blocks=extras_at)
        title = f"{extras_at:,} blocks"
        cases += [
            Case(f"{title}, 4 proxies", replace(base, proxies=4), decides=False),
            Case(f"{title}, events 2 s later", replace(base, network_s=2.0), decides=False),
            Case(f"{title}, events 20 s later", replace(base, network_s=20.0), decides=False),
        ]
    return cases


def run(source: Source, cases: Sequence[Case], seeds: int, jobs: int) -> list[Result]:
    """Every variant of every case under every seed, over `jobs` processes; the order of results is fixed."""
    tasks = [
        (replace(case.scene, seed=seed), variant) for case in cases for variant in VARIANTS for seed in range(seeds)
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _load, (source,)) as pool:
        outcomes = iter(list(pool.map(_replay, tasks)))
    return [Result(case, {name: [next(outcomes) for _ in range(seeds)] for name in VARIANTS}) for case in cases]


def _load(source: Source) -> None:
    _trace.extend(source.read())


def _replay(task: tuple[Scene, str]) -> Outcome:
    scene, variant = task
    return Replay(scene, variant).run(_trace)


def block_of(results: Sequence[Result]) -> Block:
    """The ratio is to the better oracle; means over seeds, but for its range."""
    lines = []
    for result in results:
        for name, outcomes in result.outcomes.items():
            low, high = result.spread(name)
            lines.append(
                (
                    result.case.title,
                    VARIANTS[name].title,
                    f"{result.hit_rate(name):.2%}",
                    f"{result.to_oracle(name):.3f}",
                    f"{low:.3f}-{high:.3f}",
                    f"{statistics.mean(o.misjudged for o in outcomes):.2%}",
                    f"{statistics.mean(o.mean_ttft_s for o in outcomes):.2f}",
                )
            )
    head = ("cache per worker", "router knows", "hit rate", "to oracle", "by seed", "misjudged", "mean TTFT, s (model)")
    return Block("Hit rate of prompt tokens by what the router knows (simulated)", head, lines, names=2)


def goals(results: Sequence[Result]) -> list[str]:
    """One line per case that decides."""
    lines = []
    for result in results:
        if result.case.decides:
            ratio = result.to_oracle("index")
            verdict = "met" if ratio >= GOAL else "NOT met"
            lines.append(
                f"{verdict}: at {result.case.title} our index reaches {ratio:.3f} of the better oracle's hit rate "
                f"(goal: at least {GOAL})"
            )
    return lines


def as_json(results: Sequence[Result]) -> list[dict[str, object]]:
    """Everything, every seed apart."""
    return [
        {
            "case": result.case.title,
            "scene": asdict(result.case.scene),
            "to_oracle": {name: result.to_oracle(name) for name in VARIANTS},
            "outcomes": {name: [asdict(o) for o in outcomes] for name, outcomes in result.outcomes.items()},
        }
        for result in results
    ]
