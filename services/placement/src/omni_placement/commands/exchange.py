"""`omni placement import` and `export`: layouts and loads between files and running services."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from omni.placement.v1 import placement_service_pb2 as pb
from omni_common.command import examples
from omni_common.errors import NotFound
from omni_placement.commands import formats, options
from omni_placement.commands.asked import Where
from omni_placement.commands.client import load_from_wire, named_from_wire
from omni_placement.commands.formats import Named
from omni_placement.commands.options import refusals
from omni_placement.commands.work import steps
from omni_placement.load import Phase
from omni_placement.report.units import size

IMPORT_EPILOG = examples(
    "omni placement import layout.npy --model tiny-moe",
    "omni placement import layout.npy --dry-run",
    "omni placement import layout.npy --to layout.json",
    "omni placement import activation_dump/ --to load.csv",
    exit_codes="2 the file cannot be used; 4 no such service or group",
)
EXPORT_EPILOG = examples(
    "omni placement export layout.npy",
    "omni placement export before.json --model tiny-moe --version 3",
    "omni placement export load.csv --load --phase decode",
    exit_codes="2 a file of that ending cannot be written; 4 no such service, group or version",
)
Target = Annotated[Path, typer.Argument(help="A layout: .npy or .json. A load: .npy or .csv.", show_default=False)]


def import_(
    context: typer.Context,
    source: Annotated[
        Path, typer.Argument(help="A layout or, with --to, a load of any format.", show_default=False, exists=True)
    ],
    model: options.Model = "",
    to: Annotated[
        Path | None, typer.Option(help="Only convert: write this file, ask no service.", show_default=False)
    ] = None,
    phase: options.PhaseOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be moved; publish nothing.")] = False,
    as_json: options.AsJson = False,
    placement: options.Address = None,
    name: options.Name = None,
    port: options.Port = None,
    home: options.Home = None,
) -> None:
    """Put a layout in force exactly as the file has it, or convert between formats.

    The service publishes it as the group's next version and stages the moves; `omni placement show` follows them, and
    `omni placement rollback` undoes it.
    """
    with refusals(), steps() as progress:
        if to is not None:
            _convert(source, to, phase)
            print(json.dumps({"file": str(to)}) if as_json else to)
            return
        service = Where(placement, name, port, home).service(context)
        group = service.resolve(model)
        progress.say("checking")
        known = service.in_force(group).named.layout
        layout = formats.read_layout(source, known.topology).layout
        progress.say("publishing")
        answer = service.publish(group, layout, dry_run=dry_run)
    _show_published(answer, dry_run, as_json)


def _convert(source: Path, to: Path, phase: Phase | None) -> None:
    if source.is_file() and formats.is_layout(source):
        formats.write_layout(to, formats.read_layout(source))
    else:
        formats.write_load(to, formats.read_load(source, phase))


def _show_published(answer: pb.PlanResponse, dry_run: bool, as_json: bool) -> None:
    balancedness = np.array(answer.balancedness)
    said = {
        "version": answer.layout.layout_version,
        "balancedness_mean": float(balancedness.mean()),
        "step_load": answer.predicted_step_load,
        "step_load_before": answer.current_step_load,
        "moved_bytes": answer.moved_bytes,
        "rounds": answer.num_rounds,
        "gain_ms": answer.decision.gain_ms,
        "cost_ms": answer.decision.cost_ms,
        "ms_per_token": answer.decision.ms_per_token,
    }
    if as_json:
        print(json.dumps(said, indent=2))
        return
    change = answer.predicted_step_load / answer.current_step_load - 1 if answer.current_step_load else 0.0
    what = "would be published" if dry_run else f"version {answer.layout.layout_version} is in force"
    sent = f", {size(answer.moved_bytes)} sent" if answer.moved_bytes else ""
    print(f"{what}: step load {change:+.1%}, {answer.num_rounds} rounds{sent}")


def export(
    context: typer.Context,
    target: Target,
    model: options.Model = "",
    version: Annotated[int, typer.Option(min=0, help="0: the one in force.")] = 0,
    load: Annotated[bool, typer.Option("--load", help="The load instead of the layout.")] = False,
    phase: options.PhaseOption = None,
    placement: options.Address = None,
    name: options.Name = None,
    port: options.Port = None,
    home: options.Home = None,
) -> None:
    """Write the layout in force, an earlier one, or the load of a running service to a file.

    The load is the forecast, or with --phase what that phase reported. `.csv` is what OmniPlacement's tools read.
    """
    with refusals(), steps():
        formats.check_ending(target, *((".npy", ".csv") if load else (".npy", ".json")))
        service = Where(placement, name, port, home).service(context)
        group = service.resolve(model)
        known = service.in_force(group)
        if load:
            counts = load_from_wire(service.load(group), known.named.layout.topology, phase)
            if counts is None:
                raise NotFound(f"no load of {group.label} was reported", field="--phase" if phase else None)
            formats.write_load(target, counts)
        else:
            named = known.named if version in (0, known.named.version) else _earlier(service.history(group, 0), version)
            formats.write_layout(target, named)
    print(target)


def _earlier(records: Sequence[pb.LayoutRecord], version: int) -> Named:
    kept = {record.layout.layout_version: record.layout for record in records}
    if version not in kept:
        versions = ", ".join(map(str, sorted(kept))) or "none"
        raise NotFound(f"version {version} is not kept (there are: {versions})", field="--version")
    return named_from_wire(kept[version])
