"""How a chat template takes an assistant's tool calls.

Most want a call's arguments as an object, and "" where nothing was said; DeepSeek's want text, and null. A template
that is given the other kind fails, or leaves the calls out without a word. So each is tried when it is loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omni_common.errors import InvalidRequest
from omni_proxy.output_formats import exact_json

Messages = Sequence[Mapping[str, Any]]

_NAME, _VALUE = "omniprobe", "omnivalue"
_CALL = {"id": "omniprob1", "type": "function", "function": {"name": _NAME, "arguments": f'{{"at": "{_VALUE}"}}'}}
_PROBE: Messages = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "b", "tool_call_id": _CALL["id"], "name": _NAME},
)


@dataclass(frozen=True, slots=True)
class CallShape:
    """What messages with calls become. Their arguments come as text."""

    with_text: bool = False
    with_null: bool = False

    def shaped(self, messages: Messages) -> Messages:
        return [self._shaped(m) if m.get("tool_calls") else m for m in messages]

    def _shaped(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        calls = message["tool_calls"]
        if not self.with_text:
            calls = [{**call, "function": _with_object(call["function"])} for call in calls]
        nothing = None if self.with_null else ""
        return {**message, "content": message.get("content") or nothing, "tool_calls": calls}


def shape_for(render: Callable[[Messages], str]) -> CallShape:
    """The first shape in which a call is shown; `render` raises `InvalidRequest` where the template fails."""
    shapes = [CallShape(with_text, with_null) for with_text in (False, True) for with_null in (False, True)]
    for shape in shapes:
        try:
            text = render(shape.shaped(_PROBE))
        except InvalidRequest:
            continue
        if _NAME in text and _VALUE in text:
            return shape
    return shapes[0]


def _with_object(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """Models write broken arguments too. They stay as they are: refused, they would end the conversation."""
    try:
        arguments = exact_json(function["arguments"])
    except (ValueError, RecursionError):
        return function
    return {**function, "arguments": arguments} if isinstance(arguments, dict) else function
