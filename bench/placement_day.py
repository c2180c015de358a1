"""Replay a simulated day of expert load under several ways to decide when to move experts.

    python bench/placement_day.py --quick
    python bench/placement_day.py --json day.json --markdown day.md --plot day.png

Simulated: the router's choices follow a stated model of traffic, time is tokens of the slowest rank times a constant,
and no device is involved. Solvers, load book, forecast, economy and the count of moved bytes are the service's own.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from placementday.report import as_json, block_of, draw, verdicts
from placementday.runs import TITLES, Scene, run
from placementday.traffic import CLASSES, Day
from rich.console import Console
from sidebyside.machine import machine
from sidebyside.tables import markdown, show

from omni_placement.economy import Costs
from omni_placement.layout import Topology

LAYERS = 58
QUICK_LAYERS = 2
QUICK = ("never", "60s/greedy_lpt", "60s/omni", "3000/deepseek_eplb", "3000/omni", "service", "oracle")
# Three matrices of 7168 x 2048 in 8 bits.
EXPERT_BYTES = 3 * 7168 * 2048


def notes_of(scene: Scene, seconds: float) -> list[str]:
    """What the reader must know of the model."""
    day, shape, costs, facts = scene.day, scene.topology, scene.costs, machine(("numpy", "numba"))
    return [
        f"simulated: {shape.num_layers} of {LAYERS} layers (figures scaled to {LAYERS}), {shape.num_experts} experts "
        f"on {shape.num_ranks} ranks of {shape.slots_per_rank} slots; {day.steps_per_s:g} steps/s all day, "
        f"{day.tokens_per_step:,.0f} routed tokens per step and layer at full load, {costs.ms_per_token * 1e3:g} us "
        "per token on a layer's slowest rank; all that placement cannot change (attention, dense layers) is left out",
        f"{len(CLASSES)} traffic classes with a daily course each, one of which begins at 14:00 with a quarter of the "
        f"capacity; popularity drifts with a time of {day.drift_hours:g} h; {day.bursts} bursts of 2 to 8 minutes; "
        f"seed {day.seed}",
        f"a round of a migration takes {EXPERT_BYTES / 1e6:.0f} MB / {costs.bandwidth_bytes_per_s / 1e9:g} GB/s x "
        f"{costs.exposed:g} + {costs.stall_ms_per_round:g} ms, for all systems alike, as many rounds as the busiest "
        "rank has experts to receive or send; every system starts from experts in order with empty spare slots",
        "fixed ways plan from the counts of the last minute and always move; over the oracle: in time together",
        f"one seed, one run of {seconds:.0f} s; times of plans are of a machine shared with others: {facts}",
    ]


def main(
    quick: Annotated[bool, typer.Option(help=f"{QUICK_LAYERS} layers and fewer systems")] = False,
    systems: Annotated[str, typer.Option(help=f"Of {', '.join(TITLES)}")] = "",
    layers: Annotated[int | None, typer.Option(min=1, max=LAYERS, help="Simulate so many; default 12")] = None,
    ranks: Annotated[int, typer.Option(min=1)] = 32,
    slots: Annotated[int, typer.Option(min=1, help="Slots per rank and layer")] = 9,
    seed: Annotated[int, typer.Option(min=0)] = 1,
    exposed: Annotated[float, typer.Option(min=0, max=1, help="Share of transfers that steps wait for")] = 1.0,
    drift: Annotated[float | None, typer.Option(min=0, help="Deviation of drifting log popularity")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the table here")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw imbalance over the day here, PNG")] = None,
) -> None:
    """Total step time and moved bytes over a day, by who decides when to move experts."""
    began_s = time.perf_counter()
    count = layers or (QUICK_LAYERS if quick else 12)
    day = Day(num_layers=count, seed=seed)
    day = day if drift is None else replace(day, drift=drift)
    topology = Topology(count, day.num_experts, ranks, slots, ranks_per_host=min(16, ranks), expert_bytes=EXPERT_BYTES)
    scene = Scene(day, topology, Costs(ms_per_token=0.0008, exposed=exposed))
    names = systems.split(",") if systems else list(QUICK if quick else TITLES)
    if unknown := [name for name in names if name not in TITLES]:
        raise typer.BadParameter(f"{unknown[0]} is none of {', '.join(TITLES)}")
    names = [name for name in TITLES if name in {*names, "service", "oracle"}]
    outcomes = run(scene, names, jobs)
    block, notes = block_of(outcomes, LAYERS / count), notes_of(scene, time.perf_counter() - began_s)
    lines = [*verdicts(outcomes), *notes]
    show([block], lines, Console(width=max(Console().width, 150)))
    if json_file:
        json_file.write_text(json.dumps({"notes": notes, "layers": count, "systems": as_json(outcomes)}) + "\n")
    if markdown_file:
        markdown_file.write_text(markdown([block], lines))
    if plot:
        draw(plot, outcomes)


if __name__ == "__main__":
    typer.run(main)
