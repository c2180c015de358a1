"""Tables, verdicts and the drawing of a day's outcomes."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from sidebyside.tables import Block

from placementday.replay import Outcome
from placementday.runs import BOUND, OURS, TITLES
from placementday.traffic import TICK_S

HEAD = (
    "system",
    "waiting for slowest ranks, h",
    "migrating, h",
    "together, h",
    "over the oracle",
    "moved, TB",
    "publications",
    "imbalance",
    "plan, ms",
)


def block_of(outcomes: Mapping[str, Outcome], scale: float) -> Block:
    """One row per system; `scale` is whole layers over simulated ones."""
    bound = outcomes[BOUND].total_ms
    rows = [
        [
            TITLES[name],
            f"{_hours(o.expert_ms, scale):.3f}",
            f"{_hours(o.migration_ms, scale):.3f}",
            f"{_hours(o.total_ms, scale):.3f}",
            f"{o.total_ms / bound - 1:+.2%}",
            f"{o.moved_bytes * scale / 1e12:.1f}",
            f"{o.publications:,}",
            f"{o.expert_ms / o.even_ms:.3f}",
            f"{o.plan_ms:.0f}",
        ]
        for name, o in outcomes.items()
    ]
    return Block("A simulated day by who decides when to move experts", HEAD, rows)


def verdicts(outcomes: Mapping[str, Outcome]) -> list[str]:
    """For each fixed way: whether the service needs less time, and moves fewer bytes."""
    ours, lines = outcomes[OURS], []
    for name, other in outcomes.items():
        if name.startswith(("service", "oracle")):
            continue
        saved = 1 - ours.total_ms / other.total_ms
        is_both = saved > 0 and ours.moved_bytes < other.moved_bytes
        moved = f"{ours.moved_bytes / other.moved_bytes:.1%} of its bytes" if other.moved_bytes else "it moves nothing"
        word = "wins on both" if is_both else "wins on time only" if saved > 0 else "wins on neither"
        if saved <= 0 and ours.moved_bytes < other.moved_bytes:
            word = "wins on bytes only"
        lines.append(f"against {TITLES[name]}: {word} (time {-saved:+.2%}, {moved})")
    return lines


def as_json(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    return {name: asdict(outcome) | {"title": TITLES[name]} for name, outcome in outcomes.items()}


def draw(path: Path, outcomes: Mapping[str, Outcome], smooth_ticks: int = 10) -> None:
    """Imbalance over the day as PNG, whole and near the bound, above the bytes moved until then."""
    matplotlib.use("Agg")
    figure, (whole, near, moved) = plt.subplots(3, 1, figsize=(11, 10), sharex=True, height_ratios=(2, 3, 2))
    highest = 1.0
    for number, (name, outcome) in enumerate(outcomes.items()):
        values = np.convolve(outcome.imbalance, np.full(smooth_ticks, 1 / smooth_ticks), mode="valid")
        hours = (np.arange(len(values)) + smooth_ticks / 2) * TICK_S / 3600
        look: dict[str, Any] = {
            "color": "black" if name in (OURS, BOUND) else plt.get_cmap("tab20")(number),
            "linewidth": 2.0 if name == OURS else 1.0,
            "linestyle": ":" if name == BOUND else "-",
        }
        for axes in (whole, near):
            axes.plot(hours, values, label=TITLES[name], **look)
        if outcome.moved_bytes:
            total = np.cumsum(outcome.moved_by_tick) / 1e12
            moved.plot(np.arange(len(total)) * TICK_S / 3600, total, **look)
        if outcome.publications > 1 and name != "service/bursts":
            highest = max(highest, float(np.percentile(values, 99.5)))
    whole.legend(fontsize=7, ncols=2)
    near.set_ylim(1.05, highest)
    for axes in (whole, near):
        axes.set_ylabel(f"slowest / mean rank, {smooth_ticks * TICK_S / 60:g} min")
    moved.set_ylabel("TB moved (layers simulated)")
    moved.set_yscale("log")
    moved.set_xlabel("hour of the day")
    moved.set_xlim(0, 24)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _hours(ms: float, scale: float) -> float:
    return ms * scale / 3.6e6
