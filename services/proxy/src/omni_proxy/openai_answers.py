"""Answers as OpenAI's clients read them: whole objects, and server-sent events with rendered frames.

A text event is `prefix + JSON string + suffix`; prefix and suffix are made once per choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from omni_proxy.output_parser import ToolCall

DONE = b"data: [DONE]\n\n"
_MARK = "@@text@@"


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every event of one answer repeats. `has_usage` adds `usage: null` to those without it."""

    id: str
    created: int
    model: str
    has_usage: bool = False

    def body(self, object_name: str, choices: Sequence[Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
        }


@dataclass(slots=True)
class WholeChoice:
    index: int
    text: str
    finish_reason: str
    stop: str | int | None = None
    logprobs: dict[str, Any] | None = None
    tool_calls: Sequence[ToolCall] = ()
    reasoning: str | None = None


class Events(Protocol):
    """Server-sent events of one choice."""

    def opening(self) -> bytes: ...

    def text(self, text: str, logprobs: dict[str, Any] | None, usage: Usage | None) -> bytes: ...

    def reasoning(self, text: str, usage: Usage | None) -> bytes: ...

    def calls(self, calls: Sequence[ToolCall], first_index: int) -> bytes: ...

    def closing(self, finish_reason: str, stop: str | int | None, usage: Usage | None) -> bytes: ...


class ChatEvents:
    object_name = "chat.completion.chunk"

    def __init__(self, envelope: Envelope, index: int) -> None:
        self._envelope = envelope
        self._index = index
        self._prefix, self._suffix = _split(self._event({"content": _MARK}, None, None, None))

    def opening(self) -> bytes:
        return self._event({"role": "assistant", "content": ""}, None, None, None)

    def text(self, text: str, logprobs: dict[str, Any] | None, usage: Usage | None) -> bytes:
        if logprobs is None and usage is None:
            return b"".join((self._prefix, orjson.dumps(text), self._suffix))
        return self._event({"content": text}, None, logprobs, usage)

    def reasoning(self, text: str, usage: Usage | None) -> bytes:
        return self._event({"reasoning": text}, None, None, usage)

    def calls(self, calls: Sequence[ToolCall], first_index: int) -> bytes:
        entries = [{"index": first_index + i, **_call_body(call)} for i, call in enumerate(calls)]
        return self._event({"tool_calls": entries}, None, None, None)

    def closing(self, finish_reason: str, stop: str | int | None, usage: Usage | None) -> bytes:
        return self._event({}, finish_reason, None, usage, stop)

    def _event(
        self,
        delta: dict[str, Any],
        finish_reason: str | None,
        logprobs: dict[str, Any] | None,
        usage: Usage | None,
        stop: str | int | None = None,
    ) -> bytes:
        choice = {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        if finish_reason is not None:
            choice["stop_reason"] = stop
        return _event(self._envelope, self.object_name, [choice], usage)


class CompletionEvents:
    object_name = "text_completion"

    def __init__(self, envelope: Envelope, index: int) -> None:
        self._envelope = envelope
        self._index = index
        self._prefix, self._suffix = _split(self._event(_MARK, None, None, None))

    def opening(self) -> bytes:
        return b""

    def text(self, text: str, logprobs: dict[str, Any] | None, usage: Usage | None) -> bytes:
        if logprobs is None and usage is None:
            return b"".join((self._prefix, orjson.dumps(text), self._suffix))
        return self._event(text, None, logprobs, usage)

    def reasoning(self, text: str, usage: Usage | None) -> bytes:
        return b""

    def calls(self, calls: Sequence[ToolCall], first_index: int) -> bytes:
        return b""

    def closing(self, finish_reason: str, stop: str | int | None, usage: Usage | None) -> bytes:
        return self._event("", finish_reason, None, usage, stop)

    def _event(
        self,
        text: str,
        finish_reason: str | None,
        logprobs: dict[str, Any] | None,
        usage: Usage | None,
        stop: str | int | None = None,
    ) -> bytes:
        choice = {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        if finish_reason is not None:
            choice["stop_reason"] = stop
        return _event(self._envelope, self.object_name, [choice], usage)


def usage_event(envelope: Envelope, object_name: str, usage: Usage) -> bytes:
    """The last event before `DONE` when usage was asked for: no choices."""
    return _event(envelope, object_name, [], usage)


def chat_answer(envelope: Envelope, choices: Sequence[WholeChoice], usage: Usage) -> bytes:
    bodies = []
    for choice in choices:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.reasoning is not None:
            message["reasoning"] = choice.reasoning
        if choice.tool_calls:
            message["tool_calls"] = [_call_body(call) for call in choice.tool_calls]
            message["content"] = choice.text or None
        bodies.append({"index": choice.index, "message": message, **_ending(choice)})
    return orjson.dumps({**envelope.body("chat.completion", bodies), "usage": usage.body()})


def completion_answer(envelope: Envelope, choices: Sequence[WholeChoice], usage: Usage) -> bytes:
    bodies = [{"index": choice.index, "text": choice.text, **_ending(choice)} for choice in choices]
    return orjson.dumps({**envelope.body("text_completion", bodies), "usage": usage.body()})


def _ending(choice: WholeChoice) -> dict[str, Any]:
    return {"logprobs": choice.logprobs, "finish_reason": choice.finish_reason, "stop_reason": choice.stop}


def _call_body(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _event(envelope: Envelope, object_name: str, choices: Sequence[Any], usage: Usage | None) -> bytes:
    body = envelope.body(object_name, choices)
    if usage is not None:
        body["usage"] = usage.body()
    elif envelope.has_usage:
        body["usage"] = None
    return b"data: " + orjson.dumps(body) + b"\n\n"


def _split(event: bytes) -> tuple[bytes, bytes]:
    # The text comes last but for constants, so that a model of the mark's name does no harm.
    prefix, _, suffix = event.rpartition(orjson.dumps(_MARK))
    return prefix, suffix
