"""Medians of repeats and ratios, as a table and as JSON."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from sidebyside.measure import Load, Point
from sidebyside.run import Results
from sidebyside.tables import Block

BASELINE = "b"


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of a load's block: its title, its field of `Point`, its digits."""

    title: str
    name: str
    digits: int = 1


FIGURES = (
    Figure("output tokens/s", "tokens_per_s", 0),
    Figure("TTFT median, ms", "ttft_ms"),
    Figure("ITL median, ms", "itl_p50_ms", 2),
    Figure("ITL p99, ms", "itl_p99_ms"),
    Figure("time per output token, median, ms", "tpot_ms", 2),
    Figure("serving CPU, us/token", "serving_cpu_us", 0),
)
LONG_FIGURES = (
    Figure("long prompts: TTFT median, ms", "long_ttft_p50_ms", 0),
    Figure("long prompts: TTFT p99, ms", "long_ttft_p99_ms", 0),
)


def median_point(points: Sequence[Point]) -> dict[str, float]:
    """The median of every number over the repeats."""
    numbers = [f.name for f in fields(Point) if f.name != "parts_cpu_us"]
    return {name: statistics.median(getattr(p, name) for p in points) for name in numbers}


def median_parts(points: Sequence[Point]) -> dict[str, float]:
    """CPU of each process beside the engine, microseconds per output token."""
    return {name: statistics.median(p.parts_cpu_us.get(name, 0.0) for p in points) for name in points[0].parts_cpu_us}


def block_of(results: Results, loads: Sequence[Load]) -> Block:
    """Load, figure, and one cell per system: the median, and its ratio to the vLLM server's."""
    lines: list[tuple[str, ...]] = []
    for load in loads:
        medians = {key: median_point(by_load[load.name]) for key, by_load in results.points.items()}
        for figure in FIGURES + (LONG_FIGURES if load.long_rate_per_s else ()):
            cells = [_cell(figure, values, medians.get(BASELINE)) for values in medians.values()]
            lines.append((load.name, figure.title, *cells))
    return Block(
        "Serving on CPU, median of repeats (ratio to b)",
        ("load", "figure", *results.points),
        lines,
        names=2,
        notes=_notes(results, loads),
    )


def _cell(figure: Figure, values: Mapping[str, float], baseline: Mapping[str, float] | None) -> str:
    value = values[figure.name]
    text = f"{value:,.{figure.digits}f}"
    if baseline is None or baseline is values or not baseline[figure.name]:
        return text
    return f"{text} (x{value / baseline[figure.name]:.2f})"


def _notes(results: Results, loads: Sequence[Load]) -> list[str]:
    """Titles, where the CPU goes, what bounds the run, what was left out."""
    busiest = max(loads, key=lambda load: load.streams).name
    lines = [f"{key}: {title}" for key, title in results.titles.items()]
    for key, by_load in results.points.items():
        middle = median_point(by_load[busiest])
        shares = ", ".join(f"{name} {us:.0f}" for name, us in median_parts(by_load[busiest]).items())
        lines.append(
            f"{key} at {busiest}: us/token {shares}; engine {middle['engine_cpu_us']:.0f}. "
            f"Core 1: serving {middle['serving_core_share']:.0%}, client {middle['client_core_share']:.0%}; "
            f"tokens per event {middle['tokens_per_event']:.2f}"
        )
    same = len(set(results.answers.values())) == 1
    lines.append(f"greedy answers to one question are {'equal' if same else 'NOT equal'} across systems")
    foreign = [p.foreign_share for s in results.points.values() for points in s.values() for p in points]
    if foreign:
        lines.append(
            f"other programs used {statistics.median(foreign):.0%} of the machine in the median window, "
            f"{max(foreign):.0%} in the worst"
        )
    lines += [f"{key} was left out: {reason}" for key, reason in results.skipped.items()]
    skipped = sum(p.skipped_arrivals for s in results.points.values() for points in s.values() for p in points)
    if skipped:
        lines.append(f"{skipped} long prompts found all client connections busy and were not sent")
    return lines


def as_json(results: Results, loads: Sequence[Load]) -> dict[str, object]:
    """Everything, repeats included."""
    return {
        "titles": results.titles,
        "skipped": results.skipped,
        "start_s": results.start_s,
        "answers_equal": len(set(results.answers.values())) == 1,
        "loads": [asdict(load) for load in loads],
        "points": {
            key: {name: [asdict(p) for p in points] for name, points in by_load.items()}
            for key, by_load in results.points.items()
        },
    }
