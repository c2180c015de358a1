"""What was to be reached, and whether the figures of a run reach it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LOOKUP_US, COMMANDS_RATIO, ENTRY_BYTES, EVENTS_PER_S = 1000.0, 20.0, 120.0, 200_000.0


@dataclass(frozen=True, slots=True)
class Goal:
    text: str
    is_met: bool
    figure: str

    def __str__(self) -> str:
        return f"{'met' if self.is_met else 'NOT met'}: {self.text}: {self.figure}"


def goals_of(results: Mapping[str, Any]) -> list[Goal]:
    """One or more per section that was run; each by the worst of its figures."""
    goals: list[Goal] = []
    if "replica" in results:
        goals += _replica(results["replica"])
    if "memory" in results:
        goals += _memory(results["memory"])
    if "redis" in results:
        goals += _redis(results["redis"])
    if "process" in results:
        goals += _process(results["process"])
    return goals


def _replica(cells: list[dict[str, Any]]) -> list[Goal]:
    workers = max(cell["workers"] for cell in cells)
    longest = max(row["blocks"] for row in cells[0]["lookups"])
    goals = []
    for caches in ("cold", "warm"):
        worst, where = max(
            (row["p99_us"], f"{cell['blocks']:,} blocks, {row['kind']} prompts")
            for cell in cells
            if cell["workers"] == workers
            for row in cell["lookups"]
            if (row["system"], row["blocks"], row["caches"]) == ("ours", longest, caches)
        )
        goals.append(
            Goal(
                f"lookup of {longest * 16:,} tokens under 1 ms p99 at {workers} workers, {caches} caches",
                worst < LOOKUP_US,
                f"{worst / 1000:.2f} ms at worst ({where})",
            )
        )
    entry, blocks = max((cell["ours"]["bytes"] / cell["entries"], cell["blocks"]) for cell in cells)
    text = "under 120 bytes per (block, worker) entry in the replica"
    return [*goals, Goal(text, entry < ENTRY_BYTES, f"{entry:.0f} at worst ({blocks:,} blocks)")]


def _memory(figures: dict[str, Any]) -> list[Goal]:
    return [
        Goal(
            f"under 120 bytes per entry, {kind}",
            figures[kind]["worst_bytes_per_entry"] < ENTRY_BYTES,
            f"{figures[kind]['worst_bytes_per_entry']:.0f} at worst while growing",
        )
        for kind in ("one holder", "three holders at random")
    ]


def _redis(cells: list[dict[str, Any]]) -> list[Goal]:
    ratios: list[tuple[float, str]] = []
    trips = 0.0
    for cell in cells:
        ours = {(row["holders"], row["blocks"]): row for row in cell["lookups"] if row["system"] == "ours"}
        theirs = {(row["holders"], row["blocks"]): row for row in cell["lookups"] if row["system"] == "per block"}
        for about, row in ours.items():
            holders, blocks = about
            trips = max(trips, row["round_trips"])
            ratios.append((theirs[about]["commands"] / row["commands"], f"{blocks * 16:,} tokens, {holders} holders"))
    longest = f"{max(row['blocks'] for row in cells[0]['lookups']) * 16:,} tokens"
    sent = min(
        row["blocks"] / row["round_trips"] for cell in cells for row in cell["lookups"] if row["system"] == "ours"
    )
    at_longest, at_any = min(ratio for ratio in ratios if ratio[1].startswith(longest)), min(ratios)
    return [
        Goal("one round trip per lookup through Redis", trips == 1, f"{trips:g} at most"),
        Goal(
            "at least 20 times fewer commands sent than one per block",
            sent >= COMMANDS_RATIO,
            f"{sent:g} times at the shortest prompt",
        ),
        Goal(
            f"the same counting those inside the script, {longest}",
            at_longest[0] >= COMMANDS_RATIO,
            f"{at_longest[0]:.0f} times at worst ({at_longest[1]})",
        ),
        Goal(
            "the same counting those inside the script, any length",
            at_any[0] >= COMMANDS_RATIO,
            f"{at_any[0]:.1f} times at worst ({at_any[1]})",
        ),
    ]


def _process(rows: list[dict[str, Any]]) -> list[Goal]:
    goals = []
    for row in rows:
        middle = row["median"]
        if middle["watches"] == 1 and not middle["interval_s"]:
            busiest = max(middle["core_share"], key=middle["core_share"].get)
            goals.append(
                Goal(
                    f"200,000 block events/s through one kvstore process, {middle['shape']} batches",
                    middle["events_per_s"] >= EVENTS_PER_S,
                    f"{middle['events_per_s']:,.0f}; {busiest} uses {middle['core_share'][busiest]:.0%} of a core",
                )
            )
    return goals
