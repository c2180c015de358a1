"""How families of models write their reasoning and their tool calls.

Every family brackets both with marks of its own, most of which are special tokens of its tokenizer.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

NamedCall = tuple[str, str]
"""A function's name and its arguments, a JSON object as text."""


@dataclass(frozen=True, slots=True)
class Marks:
    """What opens and what closes a part of an output."""

    open: str
    close: str


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """`read_calls` takes the text between the marks of calls; None says that it holds no call."""

    name: str
    reasoning: Marks | None = None
    calls: Marks | None = None
    read_calls: Callable[[str], Sequence[NamedCall] | None] = field(default=lambda _: None)

    @property
    def marks(self) -> frozenset[str]:
        parts = [marks for marks in (self.reasoning, self.calls) if marks is not None]
        return frozenset(mark for marks in parts for mark in (marks.open, marks.close))


def exact_json(text: str) -> Any:
    """JSON with integers of any size, which orjson rounds to a float past 64 bits.

    Raises:
        ValueError: it is no JSON, or half a surrogate pair is in it.
        RecursionError: it is nested too deeply.
    """
    orjson.loads(text)
    return json.loads(text)


def _json_calls(body: str) -> Sequence[NamedCall] | None:
    """One object with `name` and `arguments` (or `parameters`), or a list of them."""
    try:
        value = exact_json(body)
        calls = [_named(entry) for entry in (value if isinstance(value, list) else [value])]
    except (ValueError, RecursionError):
        return None
    return [call for call in calls if call is not None] if calls and None not in calls else None


def _named(value: Any) -> NamedCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    # As Python's json writes it: what clients compare and what vLLM's own server sends.
    return value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


_DEEPSEEK_CALL = re.compile(
    r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>(?P<older>[^\n]+)\n```json\n(?P<json>.*?)\n```"
    r"|(?P<name>.*?)<｜tool▁sep｜>(?P<arguments>.*?))\s*<｜tool▁call▁end｜>",
    re.DOTALL,
)


def _deepseek_calls(body: str) -> Sequence[NamedCall] | None:
    """DeepSeek-V3 and R1 name the type of a call and fence its arguments; V3.1 writes them bare."""
    calls = [
        (match["older"] or match["name"], match["json"] if match["older"] else match["arguments"])
        for match in _DEEPSEEK_CALL.finditer(body)
    ]
    return calls or None


_THINK = Marks("<think>", "</think>")
_HERMES = Marks("<tool_call>", "</tool_call>")

FORMATS: Mapping[str, OutputFormat] = {
    each.name: each
    for each in (
        OutputFormat("plain"),
        OutputFormat("hermes", None, _HERMES, _json_calls),
        OutputFormat("qwen3", _THINK, _HERMES, _json_calls),
        OutputFormat("deepseek", _THINK, Marks("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"), _deepseek_calls),
        OutputFormat("pangu", Marks("[unused16]", "[unused17]"), Marks("[unused11]", "[unused12]"), _json_calls),
    )
}


def format_of(template: str) -> OutputFormat:
    """The format that a model's chat template speaks; `hermes` where it shows nothing special.

    openPangu's templates write turns between [unused9] and [unused10].
    """
    if "[unused9]" in template:
        return FORMATS["pangu"]
    if "<｜tool▁calls▁begin｜>" in template:
        return FORMATS["deepseek"]
    return FORMATS["qwen3" if "<think>" in template else "hermes"]
