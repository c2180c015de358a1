"""Results as tables for people and as JSON."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from proxyload.caches import HELD_BYTES
from proxyload.runs import LOW_LOAD_TOKENS, PROFILED_STREAMS, REFERENCES, WAYS, Point, Results, Wishes

GOAL_TOKENS_PER_S = 40_000
GOAL_TTFT_MS = 1.5
GOAL_ITL_MS = 0.3

Rows = list[tuple[str, ...]]


def median(points: Sequence[Point], figure: Callable[[Point], float]) -> float:
    return statistics.median(figure(point) for point in points)


def load_rows(results: Results) -> Rows:
    rows: Rows = [
        ("server", "streams", "tokens/s (lowest-highest)", "tokens per CPU second", "CPU us/token", "tokens/event",
         "core used by server", "by worker", "by client", "other programs"),
    ]  # fmt: skip
    for (name, streams), points in sorted(results.load.items(), key=lambda item: (item[0][0] != "proxy", item[0])):
        rates = sorted(point.tokens_per_s for point in points)
        cpu_us = median(points, lambda p: p.server_us_per_token)
        rows.append((
            REFERENCES.get(name, name),
            f"{streams:,}",
            f"{statistics.median(rates):,.0f} ({rates[0]:,.0f}-{rates[-1]:,.0f})",
            f"{1e6 / cpu_us:,.0f}",
            f"{cpu_us:.1f}",
            f"{median(points, lambda p: p.tokens_per_event):.2f}",
            _share(points, lambda p: p.server_share),
            _share(points, lambda p: p.worker_share),
            _share(points, lambda p: p.client_share),
            _share(points, lambda p: p.foreign_share),
        ))  # fmt: skip
    return rows


def cost_of(results: Results, wishes: Wishes) -> tuple[float, float]:
    """CPU of one request and of one token in microseconds, from answers of two lengths.

    CPU per token is token + request / length at each length.
    """
    long = median(results.load["proxy", PROFILED_STREAMS], lambda p: p.server_us_per_token)
    short = median(results.short, lambda p: p.server_us_per_token)
    request = (short - long) / (1 / wishes.short_tokens - 1 / wishes.max_tokens)
    return request, long - request / wishes.max_tokens


def latency_rows(results: Results) -> Rows:
    rows: Rows = [
        ("fleet", "way", "TTFT median, ms", "TTFT p99, ms", "ITL median, ms", "ITL p99, ms", "CPU per answer, ms")
    ]
    for fleet, ways in results.latency.items():
        for way, points in ways.items():
            cpu_ms = median(points, lambda p: p.server_us_per_token) * LOW_LOAD_TOKENS / 1e3
            rows.append((
                fleet,
                WAYS[way],
                f"{median(points, lambda p: p.ttft_ms['p50']):.2f}",
                f"{median(points, lambda p: p.ttft_ms['p99']):.2f}",
                f"{median(points, lambda p: p.itl_ms['p50']):.2f}",
                f"{median(points, lambda p: p.itl_ms['p99']):.2f}",
                "" if way == "direct" else f"{cpu_ms:.1f}",
            ))  # fmt: skip
        for way, least in (("relay", "direct"), ("proxy", "relay"), ("proxy", "direct")):
            quantiles = [(metric, quantile) for metric in ("ttft", "itl") for quantile in ("p50", "p99")]
            title = f"added by the {way}" + (" beyond the relay" if least == "relay" else "")
            rows.append((fleet, title, *(f"{added(ways, *each, way, least):+.2f}" for each in quantiles), ""))
    return rows


def gap_rows(results: Results) -> Rows:
    ways = [way for way in WAYS if way != "direct"]
    titles = (*(f"TTFT {WAYS[way]}, ms" for way in WAYS), *(f"CPU {WAYS[way]}, ms" for way in ways))
    rows: Rows = [("mean gap, ms", *titles, "cache line read again, ns")]
    for gap_ms, taken in results.gaps.items():
        ttft = [f"{median(taken[way], lambda p: p.ttft_ms['p50']):.2f}" for way in WAYS]
        cpu = [f"{median(taken[way], lambda p: p.server_us_per_token) / 1e3:.2f}" for way in ways]
        lines = results.line_ns.get(gap_ms)
        rows.append((f"{gap_ms}", *ttft, *cpu, f"{statistics.median(lines):.0f}" if lines else ""))
    return rows


def added(
    ways: Mapping[str, Sequence[Point]], metric: str, quantile: str, way: str = "proxy", least: str = "direct"
) -> float:
    """Median over rounds of what a way adds to a quantile beside another one's window of the same round, in ms."""

    def value(point: Point) -> float:
        return float((point.ttft_ms if metric == "ttft" else point.itl_ms)[quantile])

    return statistics.median(value(more) - value(less) for more, less in zip(ways[way], ways[least], strict=True))


def profile_rows(results: Results) -> Rows:
    total = sum(seconds for _, _, seconds in results.profile)
    rows: Rows = [("function", "calls per token", "own time, share of these")]
    for where, calls, seconds in results.profile:
        rows.append((where, f"{calls / results.profiled_tokens:.2f}", f"{seconds / total:.0%}"))
    return rows


def goal_rows(results: Results) -> Rows:
    rows: Rows = [("goal", "measured", "met")]
    many = {streams: p for (name, streams), p in results.load.items() if name == "proxy" and streams >= 64}
    if many:
        worst = min(1e6 / median(points, lambda p: p.server_us_per_token) for points in many.values())
        text = f"at least {GOAL_TOKENS_PER_S:,} tokens per CPU second at 64 streams or more"
        rows.append((text, f"{worst:,.0f} in the worst row", _met(worst >= GOAL_TOKENS_PER_S)))
    for fleet, ways in results.latency.items():
        ttft, itl = added(ways, "ttft", "p50"), max(added(ways, "itl", "p50"), added(ways, "itl", "p99"))
        rows.append((f"{fleet}: added TTFT under {GOAL_TTFT_MS} ms", f"{ttft:.2f}", _met(ttft < GOAL_TTFT_MS)))
        text = f"{fleet}: added ITL under {GOAL_ITL_MS} ms, median and p99"
        rows.append((text, f"{itl:.2f}", _met(itl < GOAL_ITL_MS)))
    return rows


def tables(results: Results) -> dict[str, Rows]:
    """Every table that has something to say, by its title."""
    found: dict[str, Rows] = {}
    if results.load:
        found["Saturation"] = load_rows(results)
    if results.latency:
        found["Latency at a low load"] = latency_rows(results)
    if results.gaps:
        found["A request by the time since the one before"] = gap_rows(results)
    if results.profile:
        found[f"Profile at {PROFILED_STREAMS} streams"] = profile_rows(results)
    return found | {"Goals": goal_rows(results)}


def notes(results: Results, wishes: Wishes) -> list[str]:
    lines = []
    if results.short and ("proxy", PROFILED_STREAMS) in results.load:
        request, token = cost_of(results, wishes)
        lines.append(f"CPU of the proxy: {request:,.0f} us per request and {token:.1f} us per token")
    if results.load:
        slowest = max((median(p, lambda p: p.connect_max_ms), streams) for (_, streams), p in results.load.items())
        lines.append(f"slowest connection of {slowest[1]:,} opened at once: {slowest[0]:.0f} ms")
    if 0 in results.line_ns:
        lines.append(
            f"cache line of {HELD_BYTES // 1024} KiB read again at once: {statistics.median(results.line_ns[0]):.0f} ns"
        )
    return lines


def show(results: Results, wishes: Wishes, console: Console) -> None:
    for title, (head, *rows) in tables(results).items():
        table = Table(*head, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in notes(results, wishes):
        console.print(line, highlight=False)


def markdown(results: Results, wishes: Wishes) -> str:
    parts = []
    for title, (head, *rows) in tables(results).items():
        lines = [f"### {title}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        parts.append("\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]))
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in notes(results, wishes))]) + "\n"


def as_json(results: Results) -> dict[str, Any]:
    return {
        "load": [
            {"server": name, "streams": streams, "windows": [asdict(p) for p in points]}
            for (name, streams), points in results.load.items()
        ],
        "short_answers": [asdict(p) for p in results.short],
        "latency": {f: {w: [asdict(p) for p in points] for w, points in d.items()} for f, d in results.latency.items()},
        "gaps": {gap: {w: [asdict(p) for p in points] for w, points in d.items()} for gap, d in results.gaps.items()},
        "line_ns": results.line_ns,
        "profile": [{"function": where, "calls": calls, "own_s": own_s} for where, calls, own_s in results.profile],
    }


def _share(points: Sequence[Point], figure: Callable[[Point], float]) -> str:
    return f"{median(points, figure):.0%}"


def _met(is_met: bool) -> str:
    return "yes" if is_met else "no"
