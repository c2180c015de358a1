"""`omni placement show`: a layout, in a file or in force."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from omni_common.command import examples
from omni_common.errors import InvalidRequest
from omni_placement.commands import formats, options
from omni_placement.commands.asked import Where, command
from omni_placement.commands.client import PlacementService, load_from_wire
from omni_placement.commands.formats import Named
from omni_placement.commands.listing import Listing, history_of, listing_of, show_listing, worker_of
from omni_placement.commands.options import refusals
from omni_placement.commands.tables import headline
from omni_placement.commands.terminal import show_counts, show_pairs, show_relative
from omni_placement.commands.work import drawing, start, steps, study
from omni_placement.load import Phase
from omni_placement.problem import Loads, Problem
from omni_placement.report.study import Measured, Study
from omni_placement.report.summary import summary
from omni_placement.report.units import percent, tokens

EPILOG = examples(
    "omni placement show",
    "omni placement show --model tiny-moe/p8000-decode-0 --html layout.html",
    "omni placement show layout.npy --load load.npy --png layout.png",
    "omni placement show --history",
    exit_codes="2 a file is no layout; 4 no such service or group",
)
EQUAL = "no load was given: every expert is taken to be equally busy"


@dataclass(frozen=True, eq=False)
class _Shown:
    """A layout, the load to judge it by (None: not known), and what is known of it by name."""

    named: Named
    load: Loads | None
    excluded: frozenset[int]
    facts: dict[str, str]
    status: dict[str, Any]


def show(
    context: typer.Context,
    layout: Annotated[
        Path | None, typer.Argument(help=".npy or .json; left out: the one in force.", show_default=False)
    ] = None,
    model: options.Model = "",
    load: Annotated[Path | None, typer.Option(help="Judge by this load instead of the service's.")] = None,
    phase: options.PhaseOption = None,
    history: Annotated[bool, typer.Option("--history", help="The layouts published so far, newest first.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Of --history.")] = 20,
    png: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Figures; their names are added.", rich_help_panel=options.RESULT),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(dir_okay=False, help="One page with all figures.", rich_help_panel=options.RESULT)
    ] = None,
    as_json: options.AsJson = False,
    placement: options.Address = None,
    name: options.Name = None,
    port: options.Port = None,
    home: options.Home = None,
) -> None:
    """Show which rank computes how much, or how many copies each expert has where no load is known.

    Red ranks compute more than the mean of their layer, blue ones less; even is white. Where a service has several
    engine groups and none is named, they are listed.
    """
    with refusals(), steps() as progress:
        formats.check_ending(png, ".png")
        formats.check_ending(html, ".html")
        progress.say("reading")
        where = Where(placement, name, port, home)
        source = layout if layout is not None else where.service(context)
        listed = _listed(source, model, limit if history else 0, png is not None or html is not None)
        if listed is None:
            shown = _read(source, model, load, phase)
            found = _study(shown)
            progress.say("drawing")
            _draw(found, png, html, shown)
    if listed is not None:
        show_listing(listed, as_json)
    elif as_json:
        print(json.dumps(summary(found) | shown.status | {"load_known": shown.load is not None}, indent=2))
    else:
        _show(found, shown, Console())


def _listed(source: Path | PlacementService, model: str, past: int, is_drawn: bool) -> Listing | None:
    """The history of a group, or the groups where several could be meant; None where one layout is to be shown."""
    if isinstance(source, Path):
        if past:
            raise InvalidRequest("a file has no history; leave it out", field="--history")
        return None
    if past:
        return history_of(source.history(source.resolve(model), past))
    if model or is_drawn:
        return None
    groups = source.groups()
    return listing_of(groups) if len(groups) > 1 else None


def _read(source: Path | PlacementService, model: str, load: Path | None, phase: Phase | None) -> _Shown:
    if isinstance(source, PlacementService):
        return _from_service(source, model, load, phase)
    named = formats.read_layout(source)
    counts = formats.read_load(load, phase) if load is not None else None
    facts = {"file": str(source)}
    if named.version:
        facts["version"] = f"{named.version}, {named.solver}"
    return _Shown(named, counts, frozenset(), facts, {"file": str(source)})


def _from_service(service: PlacementService, label: str, load: Path | None, phase: Phase | None) -> _Shown:
    group = service.resolve(label)
    known, answer = service.in_force(group), service.load(group)
    status, topology = known.status, known.named.layout.topology
    counts = formats.read_load(load, phase) if load is not None else load_from_wire(answer, topology, phase)
    facts = {"group": group.label, "version": f"{known.named.version}, {known.named.solver}"}
    facts["worker"] = worker_of(status)
    if status.excluded_ranks:
        facts["excluded"] = "ranks " + ", ".join(map(str, status.excluded_ranks))
    if answer.measured_imbalance:
        facts["imbalance"] = (
            f"slowest over mean rank {answer.measured_imbalance:.3f} measured, "
            f"{answer.predicted_imbalance:.3f} predicted"
        )
    if len(answer.forecast):
        error, drift = (percent(share) if share else "not known yet" for share in (answer.forecast_error, answer.drift))
        facts["forecast"] = f"error {error}, drift since planned {drift}"
    said = {
        "model": group.model, "group": group.group, "version": known.named.version, "solver": known.named.solver,
        "worker": status.worker_id, "applied_version": status.applied_version, "migration": status.migration_id,
        "excluded_ranks": list(status.excluded_ranks), "measured_imbalance": answer.measured_imbalance,
        "predicted_imbalance": answer.predicted_imbalance, "drift": answer.drift,
    }  # fmt: skip
    return _Shown(known.named, counts, frozenset(status.excluded_ranks), facts, said)


def _study(shown: _Shown) -> Study:
    """Beside what an engine starts with: experts in order, one copy each."""
    layout = shown.named.layout
    topology = layout.topology
    load = shown.load if shown.load is not None else np.ones((topology.num_layers, topology.num_experts))
    problem = Problem(topology, load, excluded_ranks=shown.excluded)
    after = Measured(f"version {shown.named.version}" if shown.named.version else "layout", layout, problem)
    found = study(f"Expert layout {shown.facts.get('group') or shown.facts['file']}", start(problem), after)
    # The way from the start to here was not asked for.
    return Study(found.title, problem, found.before, after, found.bound)


def _draw(found: Study, png: Path | None, html: Path | None, shown: _Shown) -> None:
    if png is not None:
        names = ("expert-load", "rank-load", "balancedness", "replicas")
        drawing().write_figures(found, png, names if shown.load is not None else ("replicas",))
    if html is not None:
        origin = {"Load source": EQUAL} if shown.load is None else {}
        drawing().write_page(found, html, shown.facts | origin | {"Command": command()})


def _show(found: Study, shown: _Shown, console: Console) -> None:
    show_pairs(shown.facts, console)
    after = found.after
    if shown.load is None:
        console.print("\nno load is known; copies of each expert:\n")
        show_counts(after.layout.replicas.astype(np.float64), "expert", "copies", console)
        return
    console.print(f"\n{headline(found)}", highlight=False, soft_wrap=True)
    console.print(
        f"balancedness {after.balancedness.mean():.3f} (worst layer {after.balancedness.min():.3f}, bound "
        f"{found.best_balancedness.mean():.3f}); step load {tokens(after.step_load)} tokens, "
        f"{percent(found.gap(after))} above the bound; {after.copies.sum():,} spare copies\n",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    show_relative(found.relative_load(after), "rank", console)
