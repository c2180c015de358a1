"""`omni placement compare`: every solver on the same load and ranks."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from omni_common.command import examples
from omni_common.errors import InvalidRequest
from omni_placement.commands import formats, options
from omni_placement.commands.asked import Asked, Limits, Sources, Where, asked
from omni_placement.commands.options import numbers, pins, refusals
from omni_placement.commands.tables import headline, show_solvers
from omni_placement.commands.terminal import wide_console
from omni_placement.commands.work import Shape, Steps, drawing, solve, start, steps, study
from omni_placement.report.study import Measured, Study
from omni_placement.report.summary import row, summary
from omni_placement.solvers import SOLVERS

EPILOG = examples(
    "omni placement compare load.npy --ranks 32 --slots 9 --ranks-per-host 8",
    "omni placement compare activation_dump/ --ranks 64 --budget 64 --png solvers.png",
    "omni placement compare --from-service tiny-moe --report report/ --json",
    exit_codes="2 no such layout is possible, or an option is wrong; 4 no such service or group",
)


def compare(
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
    png: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Also draw the table.", rich_help_panel=options.RESULT)
    ] = None,
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
    """All solvers side by side: balancedness, distance to the bound, experts that would move, time.

    A solver that does not know one of the constraints says so and is left out. Times are of one run, on this machine.
    """
    with refusals(), steps() as progress:
        formats.check_ending(png, ".png")
        progress.say("reading")
        service = Where(placement, name, port, home).service(context) if from_service is not None else None
        shape = Shape(ranks, slots, ranks_per_host, rank_slots, shared_ranks, groups, expert_bytes)
        excluded = tuple(rank for text in exclude_rank or () for rank in numbers(text, "--exclude-rank"))
        limits = Limits(budget, max_replicas, excluded, pins(pin))
        question = asked(Sources(load, phase, current, service, from_service or ""), shape, limits)
        found, refused = _solve_all(question, progress)
        progress.say("drawing")
        _draw(found, question, png, report)
    if as_json:
        print(json.dumps(_to_json(found, refused), indent=2))
        return
    console = wide_console()
    console.print(f"{headline(found)}\n", highlight=False, soft_wrap=True)
    show_solvers(found, refused, console)


def _solve_all(question: Asked, progress: Steps) -> tuple[Study, dict[str, str]]:
    solved: list[Measured] = []
    refused: dict[str, str] = {}
    for solver in SOLVERS:
        progress.say(f"solving with {solver}")
        try:
            solved.append(solve(question.problem, solver))
        except InvalidRequest as error:
            refused[solver] = error.message
    if not solved:
        raise InvalidRequest(f"no solver can do this: {'; '.join(refused.values())}")
    progress.say("bound and rounds")
    best = min(solved, key=lambda measured: measured.step_load)
    return study(question.title, start(question.problem), best, solved), refused


def _draw(found: Study, question: Asked, png: Path | None, report: Path | None) -> None:
    if png is not None:
        drawing().write_figures(found, png, ("solvers",))
    if report is not None:
        drawing().write_report(found, report, question.origin)


def _to_json(found: Study, refused: dict[str, str]) -> dict[str, Any]:
    layouts = [row(found, measured) | {"moved": found.moved(measured)} for measured in found.layouts]
    return summary(found) | {"solvers": layouts, "refused": refused}
