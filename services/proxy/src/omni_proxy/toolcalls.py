"""`<tool_call>{"name": ..., "arguments": {...}}</tool_call>` blocks in output text."""

import secrets
from dataclasses import dataclass

import orjson

from omni_proxy.stops import StopMatcher

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


class ToolCallParser:
    """Splits text into what is shown and calls. A block is held until it is whole; one that is no call is shown."""

    def __init__(self) -> None:
        self._outside = StopMatcher([_OPEN], include=False)
        self._seen = ""
        self._block: str | None = None
        self.calls: list[ToolCall] = []

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Text to show, and calls that became whole."""
        shown: list[str] = []
        calls: list[ToolCall] = []
        while text or self._block is None:
            if self._block is None:
                text, is_open = self._before_block(text, shown)
                if not is_open:
                    break
                continue
            self._block += text
            text = ""
            end = self._block.find(_CLOSE)
            if end < 0:
                break
            body, text = self._block[:end], self._block[end + len(_CLOSE) :]
            self._block = None
            self._close(body, shown, calls)
        return self._trimmed("".join(shown)), calls

    def flush(self) -> str:
        """What is left of an unfinished block or mark."""
        rest = self._outside.flush() if self._block is None else _OPEN + self._block
        self._block = None
        return self._trimmed(rest)

    def _before_block(self, text: str, shown: list[str]) -> tuple[str, bool]:
        """Shows text up to an opening mark; returns what follows the mark."""
        self._seen += text
        before = self._outside.push(text)
        shown.append(before)
        if self._outside.matched is None:
            self._seen = self._seen[-len(_OPEN) :]
            return "", False
        rest = self._seen[self._seen.index(_OPEN) + len(_OPEN) :]
        self._outside, self._seen, self._block = StopMatcher([_OPEN], include=False), "", ""
        return rest, True

    def _close(self, body: str, shown: list[str], calls: list[ToolCall]) -> None:
        call = _parsed(body)
        if call is None:
            shown.append(f"{_OPEN}{body}{_CLOSE}")
        else:
            calls.append(call)
            self.calls.append(call)

    def _trimmed(self, text: str) -> str:
        """White space between and after calls is not an answer."""
        return "" if self.calls and text.isspace() else text


def _parsed(body: str) -> ToolCall | None:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    text = arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode()
    return ToolCall(f"call_{secrets.token_hex(12)}", value["name"], text)
