"""Activation dumps of OmniPlacement, in and out. Formats as its pattern tool reads and writes them:

    folder  activation_counts_recordstep_<step>_rank_<rank>.txt: a row per layer, tab-separated counts of the rank's
            positions; positions of all ranks in order are the experts (the placement was the sequential one)
    log     "[dump activation] decode step 1 in rank 0 for layer 3 get 8 experts data: 96<tab>160..."; other lines pass
    CSV     ",ep_0,ep_1,..." and then "layer_0,12,7,..."

Counts are added over steps and never rounded. The tool divides by 128 and rounds up, and its CSV holds the result;
only ratios within a layer matter to a solver, but counts below 128 have lost theirs there.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from omni_common.errors import InvalidRequest
from omni_placement.layout import Numbers
from omni_placement.load.windows import Phase

DUMP = re.compile(r"activation_counts_recordstep_\d+_rank_(\d+)\.txt")
LINE = re.compile(
    r"\[dump activation\] (prefill|decode) step \d+ in rank (\d+) for layer (\d+) get (\d+) experts data:(.*)"
)
# Far below int64, so that sums over many dumps stay exact.
LARGEST = 2**48
# Indices beyond this are typing errors; they would ask for arrays without end.
MOST_LAYERS, MOST_RANKS, MOST_EXPERTS = 4096, 65536, 65536


class BadDump(InvalidRequest):
    """An import that cannot be used; the message begins with file and line."""

    def __init__(self, path: Path, line: int | None, message: str) -> None:
        where = f"{path}" if line is None else f"{path}:{line}"
        super().__init__(f"{where}: {message}", field="load", reason="bad_dump")


def read(path: Path, phase: Phase | None = None) -> Numbers:
    """Counts as int64 (layers, experts) from a folder of dumps, a CSV (by its ending) or a log.

    `phase` chooses lines of a log.

    Raises:
        BadDump: a line or file that cannot be used, ranks or layers missing; names file and line.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.suffix.lower() == ".csv":
        return read_csv(path)
    return _read_log(path, phase)


def read_csv(path: Path) -> Numbers:
    """A table of (layer, expert) counts with the tool's header, int64 (layers, experts)."""
    rows = list(csv.reader(_text(path).splitlines()))
    if not rows or len(rows[0]) < 2 or rows[0][1:] != [f"ep_{i}" for i in range(len(rows[0]) - 1)]:
        raise BadDump(path, 1, "the header is not ',ep_0,ep_1,...'")
    counts: list[list[int]] = []
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if row[0] != f"layer_{len(counts)}":
            raise BadDump(path, number, f"expected layer_{len(counts)}, found {row[0]!r}")
        counts.append(_numbers(path, number, row[1:], len(rows[0]) - 1))
    if not counts:
        raise BadDump(path, None, "no layers")
    return np.array(counts, dtype=np.int64)


def write_csv(path: Path, load: Numbers) -> None:
    """The table that `read_csv` reads and the tool's placement step takes; counts as they are."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["", *(f"ep_{expert}" for expert in range(load.shape[1]))])
        writer.writerows([f"layer_{layer}", *row] for layer, row in enumerate(load.tolist()))


def _read_folder(folder: Path) -> Numbers:
    total: dict[int, Numbers] = {}
    for path in sorted(folder.glob("activation_counts_recordstep_*")):
        named = DUMP.fullmatch(path.name)
        if named is None:
            raise BadDump(path, None, "the name is not activation_counts_recordstep_<step>_rank_<rank>.txt")
        rank, counts = int(named[1]), _read_dump(path)
        known = total.setdefault(rank, np.zeros_like(counts))
        if known.shape != counts.shape:
            raise BadDump(path, None, f"{_size(counts)}; earlier dumps of rank {rank} have {_size(known)}")
        known += counts
    if not total:
        raise BadDump(folder, None, "no activation_counts_recordstep_*_rank_*.txt to read")
    return _joined(folder, total)


def _read_dump(path: Path) -> Numbers:
    rows: list[list[int]] = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if line.strip():
            rows.append(_numbers(path, number, line.rstrip().split("\t"), len(rows[0]) if rows else None))
    if not rows:
        raise BadDump(path, None, "no layers")
    return np.array(rows, dtype=np.int64)


def _read_log(path: Path, phase: Phase | None) -> Numbers:
    counts: dict[tuple[int, int], Numbers] = {}
    for number, found in _dumped(path):
        rank, layer, experts = (int(found[group]) for group in (2, 3, 4))
        if phase is not None and found[1] != phase.value:
            continue
        if rank >= MOST_RANKS or layer >= MOST_LAYERS:
            raise BadDump(path, number, f"rank {rank}, layer {layer} is out of any model's range")
        row = np.array(_numbers(path, number, found[5].split(), experts), dtype=np.int64)
        known = counts.setdefault((rank, layer), np.zeros_like(row))
        if len(known) != len(row):
            raise BadDump(path, number, f"{len(row)} experts; rank {rank} had {len(known)} in layer {layer} before")
        known += row
    if not counts:
        raise BadDump(path, None, "no '[dump activation]' line to read")
    num_layers = max(layer for _, layer in counts) + 1
    ranks: dict[int, Numbers] = {}
    for rank in sorted({rank for rank, _ in counts}):
        missing = [layer for layer in range(num_layers) if (rank, layer) not in counts]
        if missing:
            raise BadDump(path, None, f"layer {missing[0]} of rank {rank} is missing")
        rows = [counts[rank, layer] for layer in range(num_layers)]
        if len({len(row) for row in rows}) > 1:
            raise BadDump(path, None, f"rank {rank} has another number of experts in some layers")
        ranks[rank] = np.stack(rows)
    return _joined(path, ranks)


def _dumped(path: Path) -> Iterator[tuple[int, re.Match[str]]]:
    for number, line in enumerate(_text(path).splitlines(), start=1):
        found = LINE.search(line)
        if found is not None:
            yield number, found
        elif "[dump activation]" in line:
            raise BadDump(path, number, "a dump line that cannot be read")


def _joined(source: Path, ranks: dict[int, Numbers]) -> Numbers:
    """Ranks beside each other, in order. All must be there and alike."""
    missing = sorted(set(range(max(ranks) + 1)) - set(ranks))
    if missing:
        raise BadDump(source, None, f"rank {missing[0]} is missing of {max(ranks) + 1}")
    first = ranks[0]
    for rank, counts in ranks.items():
        if counts.shape != first.shape:
            raise BadDump(source, None, f"rank {rank} has {_size(counts)}, rank 0 has {_size(first)}")
    joined = np.concatenate([ranks[rank] for rank in sorted(ranks)], axis=1)
    if joined.shape[1] > MOST_EXPERTS:
        raise BadDump(source, None, f"{joined.shape[1]} experts")
    return joined


def _numbers(path: Path, line: int, cells: Iterable[str], expected: int | None) -> list[int]:
    numbers = []
    for cell in cells:
        text = cell.strip()
        # int() would also take signs, underscores and digits of other scripts.
        if not (text.isascii() and text.isdigit()):
            raise BadDump(path, line, f"{text!r} is not a count")
        if (number := int(text)) > LARGEST:
            raise BadDump(path, line, f"{number} is larger than 2**48")
        numbers.append(number)
    if not numbers or (expected is not None and len(numbers) != expected):
        raise BadDump(path, line, f"{len(numbers)} counts where {expected or 'some'} belong")
    return numbers


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadDump(path, None, error.strerror or "cannot be read") from error
    for encoding in ("utf-8", "gbk"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise BadDump(path, None, "is no text in UTF-8 or GBK")


def _size(counts: Numbers) -> str:
    return f"{counts.shape[0]} layers of {counts.shape[1]} experts"
