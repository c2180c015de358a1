"""HTTP/1.1 answers and server-sent events, read with as little work as possible.

Standard library only: the load process must start fast and cost little beside what it measures.
"""

import re
from collections.abc import Mapping

_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
_PROMPT_TOKENS = re.compile(rb'"prompt_tokens":\s*(\d+)')


class BadAnswer(Exception):
    """The server answered something a benchmark must not count."""


class Answer:
    """One chunked event stream. `feed` bytes, read what they brought."""

    __slots__ = ("_events", "_raw", "completion_tokens", "done", "has_headers", "prompt_tokens", "token_events")

    def __init__(self) -> None:
        self._raw = b""
        self._events = b""
        self.has_headers = False
        self.token_events = 0
        self.completion_tokens = 0
        self.prompt_tokens = 0
        self.done = False

    def feed(self, data: bytes) -> int:
        """Token-bearing events that `data` completed.

        Raises:
            BadAnswer: a status other than 200, an answer that is not chunked, or an error event.
        """
        self._raw = self._raw + data if self._raw else data
        if not self.has_headers and not self._read_headers():
            return 0
        self._dechunk()
        *events, self._events = self._events.split(b"\n\n")
        fresh = 0
        for event in events:
            fresh += self._is_token(event)
        self.token_events += fresh
        return fresh

    def _read_headers(self) -> bool:
        head, border, rest = self._raw.partition(b"\r\n\r\n")
        if not border:
            return False
        lowered = head.lower()
        if not head.startswith(b"HTTP/1.1 200") or b"transfer-encoding: chunked" not in lowered:
            raise BadAnswer(head.decode(errors="replace").splitlines()[0] + " " + rest[:300].decode(errors="replace"))
        self._raw = rest
        self.has_headers = True
        return True

    def _dechunk(self) -> None:
        raw = self._raw
        start = 0
        while (line_end := raw.find(b"\r\n", start)) > 0:
            size = int(raw[start:line_end], 16)
            end = line_end + 2 + size
            if len(raw) < end + 2:
                break
            if size == 0:
                self.done = True
            else:
                self._events += raw[line_end + 2 : end]
            start = end + 2
        self._raw = raw[start:]

    def _is_token(self, event: bytes) -> bool:
        if b'"content":"' in event:
            return b'"content":""' not in event
        if b'"usage":{' in event:
            self.completion_tokens = _number(_COMPLETION_TOKENS, event)
            self.prompt_tokens = _number(_PROMPT_TOKENS, event)
        elif b'"error"' in event:
            raise BadAnswer(event[:300].decode(errors="replace"))
        return False


def _number(pattern: re.Pattern[bytes], event: bytes) -> int:
    found = pattern.search(event)
    return int(found[1]) if found else 0


def post(host: str, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> bytes:
    """A whole request, ready to be written."""
    named = {"Host": host, "Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body
