"""Streaming chat over the proxy's OpenAI-compatible endpoint."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from omni_cli.access import base_url, http_options, why
from omni_cli.errors import NoAnswer

CONNECT_TIMEOUT_S = 5.0


@dataclass(slots=True)
class Answer:
    """What a stream has brought so far. Times in milliseconds from sending the request."""

    text: str = ""
    ttft_ms: float | None = None
    total_ms: float = 0.0
    completion_tokens: int | None = None
    finish_reason: str | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Rate after the first token; None where it cannot be told."""
        if self.ttft_ms is None or not self.completion_tokens or self.completion_tokens < 2:
            return None
        seconds = (self.total_ms - self.ttft_ms) / 1000
        return (self.completion_tokens - 1) / seconds if seconds > 0 else None


class ChatClient:
    """One proxy. Raises NoAnswer for refusals, broken streams and an unreachable proxy."""

    def __init__(self, url: str, timeout_s: float = 120.0) -> None:
        self._url = base_url(url)
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
        self._client = httpx.Client(timeout=timeout, **http_options())

    def close(self) -> None:
        self._client.close()

    def model(self) -> str:
        """The first model the proxy serves."""
        try:
            response = self._client.get(f"{self._url}/v1/models")
            if response.status_code != 200:
                raise NoAnswer(f"{self._url}: {_refusal(response.status_code, response.content)}")
            return str(response.json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise NoAnswer(f"{self._url} lists no model ({why(error)}). Is a stack running? omni status") from None

    def stream(
        self,
        model: str,
        messages: Sequence[dict[str, str]],
        answer: Answer,
        *,
        max_tokens: int,
        temperature: float | None,
    ) -> Iterator[str]:
        """Yield pieces of text as they come, and fill in `answer`."""
        body: dict[str, Any] = {
            "model": model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if temperature is not None:
            body["temperature"] = temperature
        sent = time.perf_counter()
        is_done = False
        try:
            with self._client.stream("POST", f"{self._url}/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise NoAnswer(_refusal(response.status_code, response.read()))
                for event in _events(response.iter_lines()):
                    is_done = event is None
                    if event is not None and (piece := _take(event, answer)):
                        if answer.ttft_ms is None:
                            answer.ttft_ms = (time.perf_counter() - sent) * 1000
                        answer.text += piece
                        yield piece
        except httpx.HTTPError as error:
            raise NoAnswer(f"{self._url}: {why(error)}") from None
        answer.total_ms = (time.perf_counter() - sent) * 1000
        if not is_done:
            raise NoAnswer("the stream broke off before its end")


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any] | None]:
    """Server-sent events; None for `[DONE]`."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        yield None if data == "[DONE]" else json.loads(data)


def _take(event: dict[str, Any], answer: Answer) -> str:
    if "error" in event:
        raise NoAnswer(f"the proxy ended the stream: {event['error'].get('message', 'no reason given')}")
    if usage := event.get("usage"):
        answer.completion_tokens = usage.get("completion_tokens")
    for choice in event.get("choices", ()):
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        delta = choice.get("delta") or {}
        return str(delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or "")
    return ""


def _refusal(status: int, body: bytes) -> str:
    try:
        return f"HTTP {status}: {json.loads(body)['error']['message']}"
    except (ValueError, LookupError, TypeError):
        return f"HTTP {status}: {body[:200].decode(errors='replace')}"
