"""Tables of what a service knows: its groups, and the layouts a group had."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from omni.placement.v1 import placement_service_pb2 as pb
from omni_common.errors import NotFound
from omni_placement.commands.client import Group
from omni_placement.commands.terminal import show_table, wide_console

Cell = str | int | list[int]


@dataclass(frozen=True, slots=True)
class Listing:
    """Headings are also the keys for programs."""

    headings: tuple[str, ...]
    rows: list[tuple[Cell, ...]]


def history_of(records: Iterable[pb.LayoutRecord]) -> Listing:
    """Raises `NotFound` where there is none."""
    rows = [_record(record) for record in records]
    if not rows:
        raise NotFound("no layout was published yet")
    return Listing(("version", "published", "solver", "reason", "outcome"), rows)


def listing_of(groups: Iterable[pb.GroupStatus]) -> Listing:
    rows: list[tuple[Cell, ...]] = [
        (
            Group(status.model, status.group).label,
            status.layout_version,
            status.applied_version,
            worker_of(status),
            list(status.excluded_ranks),
        )
        for status in groups
    ]
    return Listing(("group", "version", "applied", "worker", "excluded ranks"), rows)


def worker_of(status: pb.GroupStatus) -> str:
    """Who holds a group's ranks, and how far it is."""
    if not status.worker_id:
        return "none is watching"
    if status.migration_id:
        return f"{status.worker_id}, applying: round {status.rounds_done} of {status.num_rounds}"
    return f"{status.worker_id}, holds version {status.applied_version}"


def show_listing(listing: Listing, as_json: bool) -> None:
    if as_json:
        print(json.dumps([dict(zip(listing.headings, row, strict=True)) for row in listing.rows], indent=2))
    else:
        show_table(listing.headings, [tuple(map(_text, row)) for row in listing.rows], wide_console())


def _record(record: pb.LayoutRecord) -> tuple[Cell, ...]:
    published = datetime.fromtimestamp(record.published_unix_ms / 1000, UTC).isoformat(timespec="seconds")
    outcome = pb.MigrationOutcome.Name(record.outcome).removeprefix("MIGRATION_OUTCOME_").lower()
    asked = "no worker" if record.outcome == pb.MIGRATION_OUTCOME_UNSPECIFIED else outcome
    return record.layout.layout_version, published, record.layout.solver, record.reason, asked


def _text(cell: Cell) -> str:
    return ",".join(map(str, cell)) if isinstance(cell, list) else str(cell)
