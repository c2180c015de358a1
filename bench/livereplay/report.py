"""Says what came out: a table per level, the order of systems beside the simulation's, JSON."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from sidebyside.tables import Block

from livereplay.figures import PREDICTED, Point
from livereplay.run import Results

HEAD = (
    "system",
    "goodput, req/s",
    "kept",
    "failed",
    "TTFT p50 / p90, ms",
    "ITL mean / p99, ms",
    "hit rate",
    *(f"error: {model}" for model in PREDICTED),
)
Goodputs = Mapping[str, Sequence[float]]
"""By system, one per repeat or seed."""


@dataclass(frozen=True, slots=True)
class Order:
    """Two orders of the same systems by median goodput, and the pairs of which both are sure.

    A side is sure of a pair where all figures of one are above all of the other.
    """

    live: Sequence[str]
    simulated: Sequence[str]
    agreed: Sequence[tuple[str, str]]
    reversed: Sequence[tuple[str, str]]
    """Better here first."""
    unsure: int

    @property
    def lines(self) -> list[str]:
        sure = len(self.agreed) + len(self.reversed)
        lines = [
            f"order here: {' > '.join(self.live)}",
            f"order in the simulation: {' > '.join(self.simulated)}",
            f"pairs of which both are sure: {sure}, in the same order {len(self.agreed)}; of {self.unsure} others at "
            "least one is not",
        ]
        lines += [f"reversed: here {better} is better than {worse}" for better, worse in self.reversed]
        return lines


def order_of(live: Goodputs, simulated: Goodputs) -> Order:
    names = [name for name in live if name in simulated]
    agreed: list[tuple[str, str]] = []
    turned: list[tuple[str, str]] = []
    unsure = 0
    for one, other in combinations(names, 2):
        here, there = _sure(live[one], live[other]), _sure(simulated[one], simulated[other])
        if not here or not there:
            unsure += 1
            continue
        (agreed if here == there else turned).append((one, other) if here > 0 else (other, one))
    return Order(_ranked(live, names), _ranked(simulated, names), agreed, turned, unsure)


def _sure(one: Sequence[float], other: Sequence[float]) -> int:
    """1: all of the first are above; -1: all of the second; 0: they overlap."""
    return int(min(one) > max(other)) - int(min(other) > max(one))


def _ranked(goodputs: Goodputs, names: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: -statistics.median(goodputs[name]))


def simulated_goodputs(report: Mapping[str, Any], fleet: str, level: str) -> tuple[str, dict[str, list[float]]]:
    """Of `bench/scheduler.py --json`: the fleet of that title, or its first, at that level, or its knee."""
    fleets = report["fleets"]
    chosen = next((one for one in fleets if one["fleet"] == fleet), fleets[0])
    levels = {one["title"]: one for one in chosen["levels"]}
    at = levels.get(level, levels["knee"])
    promise = at["scene"]["promise"]["name"]
    goodputs = {
        name: [one["kept"][promise] * one["offered_per_s"] for one in outcomes]
        for name, outcomes in at["outcomes"].items()
    }
    return f"{chosen['fleet']}, {at['title']}", goodputs


def _rows(by_system: Mapping[str, Sequence[Point]]) -> list[tuple[str, ...]]:
    """Medians of repeats, best goodput first."""
    order = sorted(by_system, key=lambda name: -statistics.median(point.goodput for point in by_system[name]))
    return [_row(name, by_system[name]) for name in order]


def _row(name: str, points: Sequence[Point]) -> tuple[str, ...]:
    def median(figure: Callable[[Point], float]) -> float:
        return statistics.median(map(figure, points))

    low, high = min(p.goodput for p in points), max(p.goodput for p in points)
    errors = [median(lambda p, model=model: p.errors[model]) for model in PREDICTED]  # type: ignore[misc]
    return (
        name,
        f"{median(lambda p: p.goodput):.2f} ({low:.2f}-{high:.2f})",
        f"{median(lambda p: p.kept):.1%}",
        f"{median(lambda p: p.failed / p.requests):.1%}",
        f"{median(lambda p: p.ttft_p50_ms):.0f} / {median(lambda p: p.ttft_p90_ms):.0f}",
        f"{median(lambda p: p.itl_mean_ms):.1f} / {median(lambda p: p.itl_p99_ms):.0f}",
        f"{median(lambda p: p.hit_rate):.1%}",
        *("-" if math.isnan(error) else f"{error:.1%}" for error in errors),
    )


def blocks_of(results: Results) -> list[Block]:
    """A table per level."""
    return [
        Block(f"{level}: {next(iter(by_system.values()))[0].offered_per_s:.2f} requests/s", HEAD, _rows(by_system))
        for level, by_system in results.points.items()
    ]


def as_json(results: Results) -> dict[str, object]:
    """Everything, every repeat apart."""
    return {
        "knee": results.knee,
        "sweep": results.sweep,
        "load": results.load,
        "levels": {
            level: {
                name: [asdict(point) | {"goodput": point.goodput} for point in points] for name, points in by.items()
            }
            for level, by in results.points.items()
        },
    }
