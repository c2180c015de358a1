"""Layouts on disk: one JSON file per group, replaced whole."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from omni_common.errors import FailedPrecondition, Internal, InvalidRequest
from omni_placement.book import Exclusions, History, Outcome, Published
from omni_placement.layout import Layout, Topology
from omni_placement.load.book import GroupName


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Keep other services out of `directory`: two that wrote there would give one version to two layouts. The system
    lets go of it when the process ends, however it does.

    Raises:
        FailedPrecondition: another service runs on it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"state_dir {directory} is in use by another placement service"
            raise FailedPrecondition(message, field="state_dir", reason="state_dir_taken") from None
        yield


class LayoutFiles:
    """`<model>.json` for the group of the empty name, `<model>@<group>.json` for others; names escaped as in a URL."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self) -> list[History]:
        """Everything saved.

        Raises:
            Internal: a file cannot be read. Going on without it would let a version repeat.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        return [_read(path) for path in sorted(self._directory.glob("*.json"))]

    def save(self, history: History) -> None:
        """Write beside the old file, then put it in its place: a crash leaves one of the two, whole."""
        path = self._path(history.name)
        draft = path.with_suffix(".draft")
        content = {
            "model": history.name.model,
            "group": history.name.group,
            "excluded_ranks": sorted(history.exclusions.named),
            "failed_ranks": sorted(history.exclusions.failed),
            "lost_ranks": sorted(history.exclusions.lost),
            "layouts": [_content(published) for published in history.layouts],
        }
        with draft.open("w") as file:
            file.write(json.dumps(content))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        self._sync()

    def remove(self, name: GroupName) -> None:
        """Delete a group's file; one that is not there is no error."""
        self._path(name).unlink(missing_ok=True)
        self._sync()

    def _path(self, name: GroupName) -> Path:
        return self._directory / f"{file_stem(*name)}.json"

    def _sync(self) -> None:
        """Names in the directory reach the disk."""
        directory = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def file_stem(model: str, group: str) -> str:
    """Name of a group's file, without its ending."""
    return quote(model, safe="") + (f"@{quote(group, safe='')}" if group else "")


def _content(published: Published) -> dict[str, Any]:
    return {
        "version": published.version,
        "solver": published.solver,
        "reason": published.reason,
        "published_at_s": published.published_at_s,
        "outcome": published.outcome.value,
        "topology": asdict(published.layout.topology),
        "physical_to_logical": published.layout.physical.ravel().tolist(),
    }


def _read(path: Path) -> History:
    try:
        content = json.loads(path.read_text())
        name = GroupName(content["model"], content.get("group", ""))
        # Release 0.1 kept the layout in force alone, at the top of the file.
        layouts = tuple(_published(name, part) for part in content.get("layouts", [content]))
        if not layouts:
            raise ValueError("no layout")
        kinds = ("excluded_ranks", "failed_ranks", "lost_ranks")
        return History(name, layouts, Exclusions(*(frozenset(content.get(kind, ())) for kind in kinds)))
    except (OSError, ValueError, KeyError, TypeError, InvalidRequest) as error:
        raise Internal(f"cannot read the layout in {path}: {error}", reason="layout_file") from error


def _published(name: GroupName, content: dict[str, Any]) -> Published:
    shape = content["topology"]
    topology = Topology(**shape) if isinstance(shape, dict) else Topology(*shape)
    physical = np.array(content["physical_to_logical"], dtype=np.int32).reshape(topology.shape)
    return Published(
        name,
        int(content["version"]),
        content["solver"],
        Layout(topology, physical),
        content.get("reason", "requested"),
        float(content.get("published_at_s", 0.0)),
        Outcome(content.get("outcome", "none")),
    )
