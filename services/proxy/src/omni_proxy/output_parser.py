"""Output text split into reasoning, content and tool calls while it arrives."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from omni_proxy.output_formats import OutputFormat
from omni_proxy.stops import MarkFinder


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Parts:
    """What some text came to."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)


@dataclass(slots=True)
class Reading:
    """How the outputs of one request are read. `begins_inside`: the prompt has opened the reasoning already.

    Calls after the first `max_calls` are left out.
    """

    format: OutputFormat
    with_calls: bool
    shows_reasoning: bool = True
    max_calls: int | None = None
    begins_inside: bool = False

    def saw_prompt(self, rendered: str) -> None:
        """Templates open the reasoning at the very end of the prompt, if at all."""
        marks = self.format.reasoning
        self.begins_inside = marks is not None and rendered.rstrip().endswith(marks.open)

    @property
    def is_needed(self) -> bool:
        return self.format.reasoning is not None or (self.with_calls and self.format.calls is not None)


State = Callable[["OutputParser", str, Parts], str]
"""Takes text, adds to the parts what it comes to, and returns what belongs to the next state. A method, not bound: a
parser that kept one bound to itself would be left to the garbage collector."""


class OutputParser:
    """Reasoning comes first, if at all. A block of calls is held until it is whole; one that holds no call is content.

    Reasoning also ends where a call begins: some models forget to close it.
    """

    def __init__(self, reading: Reading) -> None:
        self._format = reading.format
        self._shows_reasoning = reading.shows_reasoning
        self._calls = reading.format.calls if reading.with_calls else None
        self._calls_left = reading.max_calls
        self._finder: MarkFinder | None = None
        self._block: list[str] = []
        self._space: str | None = None
        """White space since the last call; None where content has come, or no call."""
        reasoning = reading.format.reasoning
        first = OutputParser._start if reasoning else OutputParser._content
        self._state: State = OutputParser._reasoning if reading.begins_inside else first
        self._lead = ""

    def push(self, text: str) -> Parts:
        parts = Parts()
        while text:
            text = self._state(self, text, parts)
        return parts

    def flush(self) -> Parts:
        """What was held back: an unfinished block or mark."""
        parts, state = Parts(), self._state
        held = self._finder.flush() if self._finder is not None else ""
        if state is OutputParser._reasoning:
            parts.reasoning = held if self._shows_reasoning else ""
        elif state is OutputParser._call and self._calls is not None:
            parts.content = self._shown(self._calls.open + "".join(self._block) + held)
        else:
            parts.content = self._shown(self._lead + held)
        self._lead, self._block, self._state = "", [], OutputParser._content
        return parts

    def _start(self, text: str, parts: Parts) -> str:
        """Nothing but white space has come: reasoning opens here or not at all."""
        assert self._format.reasoning is not None
        mark = self._format.reasoning.open
        seen = self._lead + text
        shown = seen.lstrip()
        if shown.startswith(mark):
            self._lead = ""
            self._enter(OutputParser._reasoning)
            return shown[len(mark) :]
        if mark.startswith(shown):
            self._lead = seen
            return ""
        self._lead = ""
        self._enter(OutputParser._content)
        return seen

    def _reasoning(self, text: str, parts: Parts) -> str:
        reasoning = self._format.reasoning
        assert reasoning is not None
        marks = [reasoning.close] + ([self._calls.open] if self._calls is not None else [])
        before, mark, rest = self._found(marks, text)
        if self._shows_reasoning:
            parts.reasoning += before
        if mark == reasoning.close:
            self._enter(OutputParser._content)
        elif mark is not None:
            self._enter(OutputParser._call)
        return rest

    def _content(self, text: str, parts: Parts) -> str:
        if self._calls is None:
            parts.content += text
            return ""
        before, mark, rest = self._found([self._calls.open], text)
        parts.content += self._shown(before)
        if mark is not None:
            self._enter(OutputParser._call)
        return rest

    def _call(self, text: str, parts: Parts) -> str:
        assert self._calls is not None
        before, mark, rest = self._found([self._calls.close], text)
        self._block.append(before)
        if mark is not None:
            self._close("".join(self._block), parts)
            self._block = []
            self._enter(OutputParser._content)
        return rest

    def _close(self, body: str, parts: Parts) -> None:
        assert self._calls is not None
        found = self._format.read_calls(body)
        if found is None:
            parts.content += self._shown(f"{self._calls.open}{body}{self._calls.close}")
            return
        shown = found[: self._calls_left]
        if self._calls_left is not None:
            self._calls_left -= len(shown)
        parts.calls += [ToolCall(f"call_{secrets.token_hex(12)}", name, arguments) for name, arguments in shown]
        self._space = ""

    def _shown(self, text: str) -> str:
        """White space between and after calls is no content; it waits for what comes behind it."""
        if self._space is None:
            return text
        text = self._space + text
        self._space = text if text.isspace() or not text else None
        return "" if self._space is not None else text

    def _found(self, marks: Sequence[str], text: str) -> tuple[str, str | None, str]:
        if self._finder is None:
            self._finder = MarkFinder(marks)
        return self._finder.push(text)

    def _enter(self, state: State) -> None:
        self._state, self._finder = state, None
