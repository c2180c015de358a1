"""`omni placement plan`: a load and ranks in, a layout out."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from omni_common.command import examples
from omni_placement.commands import formats, options
from omni_placement.commands.asked import Limits, Sources, Where, asked
from omni_placement.commands.options import numbers, pins, refusals
from omni_placement.commands.tables import show_study
from omni_placement.commands.work import Shape, drawing, solve, start, steps, study
from omni_placement.report.summary import summary

EPILOG = examples(
    "omni placement plan activation_dump/ --ranks 32 --slots 9 --ranks-per-host 8",
    "omni placement plan load.npy --current layout.npy --budget 64 -o next.npy --report report/",
    "omni placement plan --from-service tiny-moe --exclude-rank 1 --json",
    "omni placement plan load.csv --ranks 144 --shared-ranks 128-143 --slots 3 --pin 0:17:4",
    exit_codes="2 no such layout is possible, or an option is wrong; 4 no such service or group",
)


def plan(
    context: typer.Context,
    load: options.LoadSource = None,
    from_service: options.FromService = None,
    phase: options.PhaseOption = None,
    ranks: options.Ranks = None,
    slots: options.SlotsPerRank = None,
    ranks_per_host: options.RanksPerHost = 0,
    rank_slots: options.RankSlots = None,
    shared_ranks: options.SharedRanks = None,
    groups: options.Groups = 1,
    expert_bytes: options.ExpertBytes = 0,
    budget: options.Budget = None,
    max_replicas: options.MaxReplicas = 0,
    exclude_rank: options.ExcludeRank = None,
    pin: options.PinOption = None,
    current: options.Current = None,
    solver: Annotated[str, typer.Option(help="`omni placement compare` lists them.")] = "omni",
    output: Annotated[
        Path, typer.Option("--output", "-o", help=".npy or .json.", rich_help_panel=options.RESULT)
    ] = Path("layout.npy"),
    report: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Also write report.html and figures here.", rich_help_panel=options.RESULT),
    ] = None,
    as_json: options.AsJson = False,
    placement: options.Address = None,
    name: options.Name = None,
    port: options.Port = None,
    home: options.Home = None,
) -> None:
    """Lay experts out so that every rank is equally busy.

    A layer of a step waits for its slowest rank; the step load is the sum over layers of that rank's tokens. The bound
    beside it is proven: no layout of the same slots is below it. Nothing is put in force: see `omni placement import`.
    """
    with refusals(), steps() as progress:
        formats.check_ending(output, ".npy", ".json")
        progress.say("reading")
        service = Where(placement, name, port, home).service(context) if from_service is not None else None
        shape = Shape(ranks, slots, ranks_per_host, rank_slots, shared_ranks, groups, expert_bytes)
        excluded = tuple(rank for text in exclude_rank or () for rank in numbers(text, "--exclude-rank"))
        limits = Limits(budget, max_replicas, excluded, pins(pin))
        question = asked(Sources(load, phase, current, service, from_service or ""), shape, limits)
        progress.say(f"solving with {solver}")
        after = solve(question.problem, solver)
        progress.say("bound and rounds")
        found = study(question.title, start(question.problem), after)
        formats.write_layout(output, formats.Named(after.layout, from_service or "", solver=solver))
        if report is not None:
            progress.say("drawing")
            drawing().write_report(found, report, question.origin)
    if as_json:
        print(json.dumps(summary(found) | {"layout": str(output)}, indent=2))
        return
    console = Console()
    show_study(found, console)
    console.print(f"\n{output}" + (f", {report / 'report.html'}" if report is not None else ""), highlight=False)
