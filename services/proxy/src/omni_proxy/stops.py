"""Stop strings and marks over text that arrives in pieces."""

from collections.abc import Sequence


class StopMatcher:
    """Passes text on, holding back only what may still become a stop string.

    The stop that is complete first wins, so the result does not depend on how the text is cut into pieces.
    """

    __slots__ = ("_firsts", "_held", "_include", "_stops", "matched")

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = tuple(stops)
        self._firsts = frozenset(stop[0] for stop in stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is safe to show. After a match `matched` is set and nothing more may be pushed."""
        if not self._held and self._firsts.isdisjoint(text):
            return text  # most text: no stop string begins in it
        buffer = self._held + text
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = buffer.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
                self.matched = stop
        if best is not None:
            self._held = ""
            return buffer[: best[0] if self._include else best[1]]
        keep = max(_overlap(buffer, stop) for stop in self._stops)
        shown = buffer[: len(buffer) - keep]
        self._held = buffer[len(buffer) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, once it is certain that no more text comes."""
        held, self._held = self._held, ""
        return held


class MarkFinder:
    """Cuts text at the first of some marks, holding back only what may still become one."""

    __slots__ = ("_firsts", "_held", "_marks")

    def __init__(self, marks: Sequence[str]) -> None:
        self._marks = tuple(marks)
        self._firsts = frozenset(mark[0] for mark in marks)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None, str]:
        """Text before the mark, the mark (None: not seen yet), and what follows it."""
        if not self._held and self._firsts.isdisjoint(text):
            return text, None, ""
        buffer, self._held = self._held + text, ""
        found = [(at, mark) for mark in self._marks if (at := buffer.find(mark)) >= 0]
        if found:
            at, mark = min(found)
            return buffer[:at], mark, buffer[at + len(mark) :]
        keep = max(_overlap(buffer, mark) for mark in self._marks)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep], None, ""

    def flush(self) -> str:
        """What was held back, once it is certain that no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that ends `text`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
