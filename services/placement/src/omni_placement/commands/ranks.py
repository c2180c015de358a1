"""`omni placement rollback` and `ranks`: what an operator does by hand."""

import json
from typing import Annotated

import typer

from omni_common.command import examples
from omni_common.errors import InvalidRequest
from omni_placement.commands import options
from omni_placement.commands.asked import Where
from omni_placement.commands.options import numbers, refusals

ROLLBACK_EPILOG = examples(
    "omni placement rollback",
    "omni placement rollback --model tiny-moe --to-version 3",
    exit_codes="2 that version has experts on excluded ranks; 4 no such service, group or version",
)
RANKS_EPILOG = examples(
    "omni placement ranks",
    "omni placement ranks --exclude 5,12-15",
    "omni placement ranks --return 5 --model tiny-moe",
    exit_codes="2 the other ranks cannot hold every expert; 4 no such service or group",
)


def rollback(
    context: typer.Context,
    model: options.Model = "",
    to_version: Annotated[
        int, typer.Option(min=0, help="As `omni placement show --history` has it.", show_default="the one before")
    ] = 0,
    as_json: options.AsJson = False,
    placement: options.Address = None,
    name: options.Name = None,
    port: options.Port = None,
    home: options.Home = None,
) -> None:
    """Put an earlier layout in force again. It becomes the newest version: versions only grow."""
    with refusals():
        service = Where(placement, name, port, home).service(context)
        named = service.rollback(service.resolve(model), to_version)
    print(json.dumps({"version": named.version}) if as_json else f"version {named.version} is in force")


def ranks(
    context: typer.Context,
    model: options.Model = "",
    exclude: Annotated[
        str | None, typer.Option(metavar="RANKS", help="Ranks that shall hold nothing: 5,12-15.", show_default=False)
    ] = None,
    return_: Annotated[
        str | None, typer.Option("--return", metavar="RANKS", help="Ranks to use again.", show_default=False)
    ] = None,
    as_json: options.AsJson = False,
    placement: options.Address = None,
    name: options.Name = None,
    port: options.Port = None,
    home: options.Home = None,
) -> None:
    """Take ranks out, or use them again; the layout is planned without them at once.

    A rank serves until its experts are elsewhere. One that a worker reported as failed is out already.

    Without an option: which ranks are out.
    """
    with refusals({"excluded_ranks": "--exclude"}):
        out, back = set(numbers(exclude, "--exclude")), set(numbers(return_, "--return"))
        if both := out & back:
            raise InvalidRequest(f"rank {min(both)} is in both", field="--return")
        service = Where(placement, name, port, home).service(context)
        group = service.resolve(model)
        known = service.in_force(group)
        excluded, version = set(known.status.excluded_ranks), known.named.version
        if unknown := back - excluded:
            raise InvalidRequest(f"rank {min(unknown)} is not out", field="--return")
        if out or back:
            excluded = (excluded | out) - back
            version = service.set_ranks(group, sorted(excluded)).version
    if as_json:
        print(json.dumps({"version": version, "excluded_ranks": sorted(excluded)}))
    else:
        print(f"out: {', '.join(map(str, sorted(excluded))) or 'none'}; version {version} is in force")
