"""What was to be reached, and whether the figures of a run reach it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from placementbench.contenders import DEEPSEEK, OURS, VLLM

GAP_RATIO, TIME_RATIO, MOVED_RATIO, SAME_BALANCE, NOISE = 0.5, 1.0, 0.30, 0.01, 1e-9
FULL_PLAN = (58, 288)
"""Layers and slots of a layer of the plan whose time is a goal."""

WHEN = {"soon": "a little", "later": "a lot"}
Record = Mapping[str, Any]
"""A cell: system, extra, family, layers, slots (of a layer), contenders (name -> figures)."""


@dataclass(frozen=True, slots=True)
class Goal:
    text: str
    is_met: bool
    figure: str

    def __str__(self) -> str:
        return f"{'PASS' if self.is_met else 'FAIL'}: {self.text}: {self.figure}"


def goals_of(records: Sequence[Record]) -> list[Goal]:
    """By the worst cell; a record has every contender."""
    return [_never_worse(records), _gap(records), *_times(records), *(_moved(records, when) for when in WHEN)]


def others(record: Record) -> dict[str, Any]:
    return {name: figures for name, figures in record["contenders"].items() if name != OURS}


def best_gap(record: Record) -> float:
    """Of the others."""
    return min(float(figures["gap"]) for figures in others(record).values())


def label(record: Record) -> str:
    return f"{record['system']}, {record['extra']} extra, {record['family']}"


def _never_worse(records: Sequence[Record]) -> Goal:
    worse = sorted(_losses(records), reverse=True)
    cells = len({where for _, _, where in worse})
    figure = f"worse in {cells} of {len(records)} cells"
    if worse:
        loss, name, where = worse[0]
        figure += f"; at worst by {loss:.5f} against {name} ({where})"
    return Goal("balancedness never below that of any other solver", not worse, figure)


def _losses(records: Sequence[Record]) -> Iterator[tuple[float, str, str]]:
    for record in records:
        ours = record["contenders"][OURS]["balance"]
        for name, figures in others(record).items():
            if (loss := figures["balance"] - ours) > NOISE:
                yield loss, name, label(record)


def _gap(records: Sequence[Record]) -> Goal:
    ours = np.array([record["contenders"][OURS]["gap"] for record in records])
    best = np.array([best_gap(record) for record in records])
    ratio = float(ours.mean() / best.mean()) if best.mean() > 0 else 0.0
    text = f"average gap to the lower bound at most {GAP_RATIO:g} of the best other's"
    figure = f"{ratio:.2f} ({ours.mean():.3%} against {best.mean():.3%}, the best other of each cell)"
    return Goal(text, ratio <= GAP_RATIO, figure)


def _times(records: Sequence[Record]) -> list[Goal]:
    """By the worst system, of the medians over its cells."""
    full = [record for record in records if (record["layers"], record["slots"]) == FULL_PLAN]
    goals = []
    for title, chosen in (("58 x 256 -> 288 plan", full), ("plan of any size", records)):
        ratios: dict[str, list[tuple[float, float]]] = {}
        for record in chosen:
            ours, theirs = (record["contenders"][name] for name in (OURS, VLLM))
            pair = ours["wall_ms"] / theirs["wall_ms"], ours["cpu_ms"] / theirs["cpu_ms"]
            ratios.setdefault(f"{record['system']}, {record['extra']} extra", []).append(pair)
        medians = {where: np.median(pairs, axis=0) for where, pairs in ratios.items()}
        if not medians:
            continue
        figure = "; ".join(f"x{wall:.2f} {where}" for where, (wall, _) in medians.items())
        if chosen is not full:
            where, (wall, cpu) = max(medians.items(), key=lambda item: float(item[1][0]))
            middle = np.median(list(medians.values()), axis=0)
            figure = (
                f"x{middle[0]:.2f} median, x{wall:.2f} at worst ({where}); of CPU time x{middle[1]:.2f}, x{cpu:.2f}"
            )
        is_met = all(wall <= TIME_RATIO for wall, _ in medians.values())
        goals.append(Goal(f"{title} no slower than vLLM's policy", is_met, figure))
    return goals


def _moved(records: Sequence[Record], when: str) -> Goal:
    ours, theirs, cells, unequal, worst = 0, 0, 0, [], (0.0, "no cell")
    for record in records:
        mine, other = (record["contenders"][name][when] for name in (OURS, DEEPSEEK))
        if mine["balance"] < other["balance"] * (1 - SAME_BALANCE):
            unequal.append(label(record))
            continue
        ours, theirs, cells = ours + mine["moved_bytes"], theirs + other["moved_bytes"], cells + 1
        if mine["moved_bytes"]:
            worst = max(worst, (mine["moved_bytes"] / max(1, other["moved_bytes"]), label(record)))
    ratio = ours / theirs if theirs else float(ours > 0)
    figure = f"{ratio:.2f} of all bytes in {cells} cells; at worst {worst[0]:.2f} ({worst[1]})"
    if unequal:
        figure += f"; less even than that in {len(unequal)} cells, such as {unequal[0]}"
    text = (
        f"after the load drifted {WHEN[when]}, a re-plan moves under {MOVED_RATIO:.0%} of what DeepSeek's moves, "
        f"for its balance within {SAME_BALANCE:.0%}"
    )
    return Goal(text, ratio < MOVED_RATIO and not unequal, figure)
