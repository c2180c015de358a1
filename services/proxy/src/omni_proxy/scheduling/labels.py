"""Workers' labels as columns: where a worker stands, and which prompt lengths it serves.

omni.host, omni.rack, omni.zone, omni.region   names unique in the fleet
omni.prompt_tokens                             prompts it is for: "0-4096", "4096-"; the upper end is not included
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from omni_proxy.scheduling.view import Bools, FleetView, Floats, Ints

PROMPT_TOKENS = "omni.prompt_tokens"
CLOSENESS: Mapping[str, float] = {"omni.host": 1.0, "omni.rack": 0.2, "omni.zone": 0.05, "omni.region": 0.02}
"""How close two workers are that share a label; the greatest that applies counts."""

Labels = Sequence[Mapping[str, str]]
T = TypeVar("T")


class PerFleet(Generic[T]):
    """Something read off the labels alone, kept while views share the same labels."""

    def __init__(self, read: Callable[[Labels], T]) -> None:
        self._read = read
        self._kept: tuple[Labels, T] | None = None

    def of(self, view: FleetView) -> T:
        if self._kept is None or self._kept[0] is not view.labels:
            self._kept = (view.labels, self._read(view.labels))
        return self._kept[1]


class Closeness:
    """How close each worker is to one of them: [0, 1], 1 for the worker itself."""

    def __init__(self, levels: Mapping[str, float]) -> None:
        self._levels = sorted(levels.items(), key=lambda level: level[1])
        self._codes = PerFleet(self._read)

    def to(self, view: FleetView, worker: str) -> Floats:
        """To the worker of that name; all 1 where the view does not have it, or its place is unknown."""
        if worker not in view.ids:
            return np.ones(len(view))
        row = view.ids.index(worker)
        codes = self._codes.of(view)
        closeness = np.zeros(len(view))
        for (_, value), column in zip(self._levels, codes, strict=True):
            if column[row]:
                closeness[column == column[row]] = value
        if not codes[:, row].any():
            return np.ones(len(view))
        closeness[row] = 1.0
        return closeness

    def _read(self, labels: Labels) -> Ints:
        return np.array([_codes([own.get(label, "") for own in labels]) for label, _ in self._levels], np.int64)


class LengthRanges:
    """[from, to) prompt tokens by worker, from the label; unlabelled ones share out `bounds` in the order of names."""

    def __init__(self, bounds: Sequence[int] = ()) -> None:
        self._edges = (0, *bounds, np.iinfo(np.int64).max)
        self._labelled = PerFleet(lambda labels: np.array([_range(own) for own in labels], np.int64).reshape(-1, 2))

    def contain(self, view: FleetView, prompt_tokens: int) -> Bools:
        """Which workers are for prompts that long."""
        ranges = self._labelled.of(view)
        is_labelled = ranges[:, 0] >= 0
        if len(self._edges) > 2 and not is_labelled.all():
            ranges = self._shared_out(view, ranges, np.flatnonzero(~is_labelled))
        low, high = ranges[:, 0], ranges[:, 1]
        return (low <= prompt_tokens) & (prompt_tokens < high)

    def _shared_out(self, view: FleetView, ranges: Ints, rows: NDArray[np.intp]) -> Ints:
        # Each role is shared out by itself, so that every bucket has workers for both legs where there are enough.
        ranges, buckets = ranges.copy(), len(self._edges) - 1
        by_name = sorted(rows, key=lambda row: view.ids[row])
        for is_decode in (False, True):
            share = [row for row in by_name if bool(view.decodes[row]) is is_decode]
            for place, row in enumerate(share):
                bucket = place * buckets // len(share)
                ranges[row] = self._edges[bucket], self._edges[bucket + 1]
        return ranges


def _codes(words: Sequence[str]) -> list[int]:
    known = {"": 0}
    return [known.setdefault(word, len(known)) for word in words]


def _range(labels: Mapping[str, str]) -> tuple[int, int]:
    """Where there is no label or it cannot be read: from -1, open."""
    low, dash, high = labels.get(PROMPT_TOKENS, "").partition("-")
    low, high = low.strip() or "0", high.strip()
    largest = int(np.iinfo(np.int64).max)
    if not dash or not low.isdecimal() or (high and not high.isdecimal()):
        return -1, largest
    return int(low), int(high) if high else largest
