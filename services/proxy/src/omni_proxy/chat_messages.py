"""Chat messages and tools as the chat template takes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from omni_proxy.fields import Fields, as_fields

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


def chat_messages(fields: Fields) -> Sequence[Mapping[str, Any]]:
    """Messages with text parts joined by newlines; arguments of calls are text, see `CallShape`."""
    messages = fields.items("messages")
    if not messages:
        raise fields.refuse("messages", "must hold at least one message", "missing_parameter")
    return [_message(as_fields(m, fields.path(f"messages[{i}]")), m) for i, m in enumerate(messages)]


def tool_definitions(fields: Fields) -> Sequence[Mapping[str, Any]]:
    tools = fields.items("tools")
    for index, tool in enumerate(tools):
        entry = as_fields(tool, fields.path(f"tools[{index}]"))
        if entry.text("type") != "function":
            raise entry.refuse("type", "must be 'function'")
        function = entry.nested("function")
        if function is None or not function.text("name"):
            raise entry.refuse("function.name", "is required", "missing_parameter")
        function.nested("parameters")
    return tools


def _message(fields: Fields, message: Mapping[str, Any]) -> Mapping[str, Any]:
    role = fields.text("role")
    if role not in _ROLES:
        raise fields.refuse("role", f"must be one of {', '.join(_ROLES)}")
    calls = [
        _tool_call(as_fields(c, fields.path(f"tool_calls[{j}]")), c) for j, c in enumerate(fields.items("tool_calls"))
    ]
    content = _content(fields)
    reasoning = fields.text("reasoning") or fields.text("reasoning_content")
    if content is None and not (role == "assistant" and (calls or reasoning)):
        raise fields.refuse("content", "is required", "missing_parameter")
    result = {**message, "role": _ROLES[role], "content": content or ""}
    if reasoning is not None:
        # Templates read one name or the other.
        result |= {"reasoning": reasoning, "reasoning_content": reasoning}
    if calls:
        result["tool_calls"] = calls
    else:
        result.pop("tool_calls", None)
    return result


def _content(fields: Fields) -> str | None:
    content = fields.raw("content")
    if not isinstance(content, list):
        return fields.text("content")
    parts: list[str] = []
    for index, part in enumerate(content):
        entry = as_fields(part, fields.path(f"content[{index}]"))
        if entry.text("type") != "text":
            raise entry.refuse("type", "only text parts are supported", "unsupported_value")
        text = entry.text("text")
        if text is None:
            raise entry.refuse("text", "is required", "missing_parameter")
        parts.append(text)
    return "\n".join(parts)


def _tool_call(fields: Fields, call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = fields.nested("function")
    if function is None or not function.text("name"):
        raise fields.refuse("function.name", "is required", "missing_parameter")
    return {**call, "function": {"name": function.text("name"), "arguments": function.text("arguments") or "{}"}}
