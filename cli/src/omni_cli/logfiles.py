"""Reading the log files of a stack: tails, following, and JSON lines made readable."""

import json
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

TAIL_BYTES = 256 * 1024
_SHOWN_APART = frozenset({"time", "level", "service", "logger", "message", "exception", "trace_id", "span_id"})


def tail(path: Path, lines: int) -> list[str]:
    """The last lines, readable; empty if there is no such file."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            content = log.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [readable(line) for line in deque(content.splitlines(), maxlen=lines)]


def readable(line: str) -> str:
    """A JSON log line as `time LEVEL message key=value`; any other line as it is."""
    if not line.startswith("{"):
        return line
    try:
        entry = json.loads(line)
    except ValueError:
        return line
    if not isinstance(entry, dict) or "message" not in entry:
        return line
    extra = "".join(f" {key}={value}" for key, value in entry.items() if key not in _SHOWN_APART)
    time = str(entry.get("time", "")).partition("T")[2][:12]
    head = f"{time} {str(entry.get('level', '')).upper():<7} {entry['message']}{extra}"
    return f"{head}\n{entry['exception']}" if "exception" in entry else head


class Follower:
    """New whole lines of a growing file, from its present end on; begins again when the file is replaced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self._partial = b""

    def new_lines(self) -> Iterator[str]:
        if not self._path.exists():
            return
        if self._path.stat().st_size < self._offset:
            self._offset, self._partial = 0, b""
        with self._path.open("rb") as log:
            log.seek(self._offset)
            content = self._partial + log.read()
            self._offset = log.tell()
        *whole, self._partial = content.split(b"\n")
        for line in whole:
            yield readable(line.decode(errors="replace"))
