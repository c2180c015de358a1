"""Options that several commands share, how they are written, and which option a refused field means."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from omni_common.errors import InvalidRequest, OmniError
from omni_placement.load import Phase
from omni_placement.problem import Pin

LOAD, SHAPE, LIMITS, SERVICE, RESULT = "Load", "Ranks and slots", "Constraints", "Running service", "Results"

LoadSource = Annotated[
    Path | None,
    typer.Argument(help=".npy (layers, experts), or OmniPlacement's .csv, log or dump folder.", show_default=False),
]
FromService = Annotated[
    str | None,
    typer.Option(
        "--from-service",
        metavar="MODEL[/GROUP]",
        help="Load, ranks and layout of a running service.",
        rich_help_panel=LOAD,
        show_default=False,
    ),
]
PhaseOption = Annotated[
    Phase | None,
    typer.Option("--phase", help="Of a log or a service: only this phase.", rich_help_panel=LOAD, show_default="all"),
]
Ranks = Annotated[int | None, typer.Option(min=1, help="Expert-parallel ranks.", rich_help_panel=SHAPE)]
SlotsPerRank = Annotated[
    int | None,
    typer.Option(
        "--slots", min=1, help="Slots per rank and layer.", rich_help_panel=SHAPE, show_default="one more than needed"
    ),
]
RanksPerHost = Annotated[
    int, typer.Option(min=0, help="Consecutive ranks on a host; 0: one host.", rich_help_panel=SHAPE)
]
RankSlots = Annotated[
    str | None,
    typer.Option(
        metavar="N[xRANKS],...",
        help="Slots each rank may use: 9x30,7x2.",
        rich_help_panel=SHAPE,
    ),
]
SharedRanks = Annotated[
    str | None,
    typer.Option(metavar="RANKS", help="Ranks of the shared expert alone: 128-143.", rich_help_panel=SHAPE),
]
Groups = Annotated[int, typer.Option(min=1, help="Expert groups of group-limited routing.", rich_help_panel=SHAPE)]
ExpertBytes = Annotated[
    int, typer.Option(min=0, help="Weight bytes of one expert of one layer; 0: unknown.", rich_help_panel=SHAPE)
]
Budget = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Copies beyond one of each expert, over all layers together.",
        rich_help_panel=LIMITS,
        show_default="every spare slot",
    ),
]
MaxReplicas = Annotated[
    int, typer.Option(min=0, help="Copies of one expert in a layer; 0: no limit.", rich_help_panel=LIMITS)
]
ExcludeRank = Annotated[
    list[str] | None,
    typer.Option(metavar="RANKS", help="Ranks that hold nothing, such as failed ones.", rich_help_panel=LIMITS),
]
PinOption = Annotated[
    list[str] | None,
    typer.Option(
        "--pin", metavar="LAYER:EXPERT:RANK", help="A copy that must be there; may repeat.", rich_help_panel=LIMITS
    ),
]
Current = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Layout in force; few of its experts move.", rich_help_panel=LIMITS),
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.", rich_help_panel=RESULT)]

Address = Annotated[
    str | None,
    typer.Option(
        "--placement",
        metavar="HOST:PORT",
        help="A placement service.",
        show_default="the running stack's",
        rich_help_panel=SERVICE,
    ),
]
Name = Annotated[
    str | None,
    typer.Option(help="The stack's name.", show_default="p<port>, or the only stack", rich_help_panel=SERVICE),
]
Port = Annotated[int | None, typer.Option(help="The stack by its port.", rich_help_panel=SERVICE)]
Home = Annotated[
    Path | None,
    typer.Option(
        envvar="OMNI_CLI_HOME",
        help="Where state lies.",
        show_default="<checkout>/.omni",
        rich_help_panel=SERVICE,
    ),
]
Model = Annotated[
    str,
    typer.Option("--model", metavar="MODEL[/GROUP]", help="Which engines.", show_default="the only ones"),
]

FIELDS: Mapping[str, str] = {
    "topology.num_ranks": "--ranks",
    "topology.slots_per_rank": "--slots",
    "topology.ranks_per_host": "--ranks-per-host",
    "topology.rank_slots": "--rank-slots",
    "topology.shared_ranks": "--shared-ranks",
    "topology.num_groups": "--groups",
    "topology.expert_bytes": "--expert-bytes",
    "budget": "--budget",
    "pinned": "--pin",
    "excluded_ranks": "--exclude-rank",
    "current": "--current",
    "max_replicas": "--max-replicas",
    "solver": "--solver",
}
"""Fields that solvers and services refuse -> the option to change."""

RANGE = re.compile(r"(\d+)(?:-(\d+))?")
REPEATED = re.compile(r"(\d+)(?:x(\d+))?")
PIN = re.compile(r"(\d+):(\d+):(\d+)")


@contextmanager
def refusals(fields: Mapping[str, str] = FIELDS) -> Iterator[None]:
    """Errors name the option to change instead of a field."""
    try:
        yield
    except OmniError as error:
        if (option := fields.get(error.field or "")) is not None:
            error.message, error.field = error.message.replace(str(error.field), option), option
        raise


def numbers(text: str | None, option: str) -> tuple[int, ...]:
    """`0,4-6` is 0, 4, 5, 6; None is none. Raises `InvalidRequest` for anything else."""
    found: list[int] = []
    for part in text.split(",") if text else ():
        match = RANGE.fullmatch(part.strip())
        if match is None:
            raise InvalidRequest(f"{part!r} is neither a number nor a range: write 0,4-6", field=option)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first > 1 << 16:
            raise InvalidRequest(f"{part!r} is no range: write the smaller number first", field=option)
        found.extend(range(first, last + 1))
    return tuple(found)


def repeated(text: str | None, option: str) -> tuple[int, ...]:
    """`9x30,7x2` is thirty nines and two sevens; None is none. Raises `InvalidRequest` for anything else."""
    found: list[int] = []
    for part in text.split(",") if text else ():
        match = REPEATED.fullmatch(part.strip())
        if match is None or int(match[2] or 1) > 1 << 16:
            raise InvalidRequest(f"{part!r} is not slots or slotsxranks: write 9x30,7x2", field=option)
        found.extend([int(match[1])] * int(match[2] or 1))
    return tuple(found)


def pins(texts: list[str] | None) -> tuple[Pin, ...]:
    """Each `layer:expert:rank`. Raises `InvalidRequest` for anything else."""
    return tuple(_pin(text) for text in texts or ())


def _pin(text: str) -> Pin:
    match = PIN.fullmatch(text)
    if match is None:
        raise InvalidRequest(f"{text!r} is no copy: write layer:expert:rank, such as 3:17:0", field="--pin")
    return int(match[1]), int(match[2]), int(match[3])
