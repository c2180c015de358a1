"""Load kept on disk, so that a restarted service plans from what it knew."""

import json
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from omni_common.errors import Internal
from omni_placement.load.windows import Counts, Phase, Stream

FORMAT = 1


@dataclass(frozen=True, slots=True, eq=False)
class StreamProfile:
    """Of one stream: `rate` tokens/s per layer, `shares` (layers, experts), `weight` tokens the shares rest on."""

    stream: Stream
    rate: Counts
    shares: Counts
    weight: Counts


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """Of one group, as it was at `saved_at_s`."""

    model: str
    group: str
    saved_at_s: float
    streams: tuple[StreamProfile, ...]

    def aged(self, now_s: float, half_life_s: float) -> "Profile":
        """The same knowledge, weighing less for its age: what is reported after a long stop soon outweighs it."""
        keep = 0.5 ** (max(now_s - self.saved_at_s, 0.0) / half_life_s)
        return replace(self, streams=tuple(replace(s, weight=s.weight * keep) for s in self.streams))


class ProfileFiles:
    """One .npz file per group in `directory`, replaced whole."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self) -> list[Profile]:
        """Everything saved.

        Raises:
            Internal: a file cannot be read; the message names it.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        return [_read(path) for path in sorted(self._directory.glob("*.npz"))]

    def save(self, profile: Profile) -> None:
        """Write to a file beside the old one, then put it in its place: a crash leaves one of the two, whole."""
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / _file_name(profile.model, profile.group)
        draft = path.with_suffix(".draft")
        with draft.open("wb") as file:
            np.savez_compressed(file, **_arrays(profile))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)

    def keep(self, names: Iterable[tuple[str, str]]) -> None:
        """Delete what was saved of groups other than these (model, group)."""
        known = {_file_name(*name) for name in names}
        for path in self._directory.glob("*.npz"):
            if path.name not in known:
                path.unlink(missing_ok=True)


def _file_name(model: str, group: str) -> str:
    return f"{quote(model, safe='')}@{quote(group, safe='')}.npz"


def _arrays(profile: Profile) -> Any:
    head = {
        "format": FORMAT,
        "model": profile.model,
        "group": profile.group,
        "saved_at_s": profile.saved_at_s,
        "streams": [[s.stream.phase.value, s.stream.traffic_class] for s in profile.streams],
    }
    arrays: dict[str, Any] = {"head": np.array(json.dumps(head))}
    for index, stream in enumerate(profile.streams):
        arrays[f"rate_{index}"], arrays[f"weight_{index}"] = stream.rate, stream.weight
        arrays[f"shares_{index}"] = stream.shares.astype(np.float32)
    return arrays


def _read(path: Path) -> Profile:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            head = json.loads(str(arrays["head"]))
            if head["format"] != FORMAT:
                raise Internal(f"{path} is of format {head['format']}, read is {FORMAT}", reason="profile_file")
            streams = tuple(
                StreamProfile(Stream(Phase(phase), name), *(_array(arrays, part, index) for part in _PARTS))
                for index, (phase, name) in enumerate(head["streams"])
            )
            return Profile(head["model"], head["group"], float(head["saved_at_s"]), streams)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise Internal(f"cannot read the load in {path}: {error}", reason="profile_file") from error


_PARTS = ("rate", "shares", "weight")


def _array(arrays: Any, part: str, index: int) -> Counts:
    array: Counts = arrays[f"{part}_{index}"].astype(np.float64)
    if not np.isfinite(array).all() or (array < 0).any() or array.ndim != 1 + (part == "shares"):
        raise ValueError(f"{part}_{index} holds no load")
    return array
