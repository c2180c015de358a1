"""The load process: `python -m proxyload.client < plan.json`; closed-loop streams over HTTP that cost little to read.

A stream's next request follows its last answer at once, or after a random time of at most `think_s`.

The first answer of a stream is cut at a random length, so that the streams do not go on in step with each other.

It prints one JSON object per line: `{"mark": "begin"}` and `{"mark": "end"}` around the measured window, then what it
saw. Every answer's length is checked, and the whole text of each stream's second one. Latencies in ms, of the window.
"""

import asyncio
import json
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import uvloop
from sidebyside.wire import BadAnswer, post

_TOKEN = b'"delta":{"content":'
_OK = b"HTTP/1.1 200"
_EVENT_END = b"\n\n\r\n"
_LAST = b"\r\n0\r\n\r\n"
_TAIL = 1024
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":(\d+)')
_CHUNK_BORDER = re.compile(rb"(?:^|\r\n)[0-9a-f]+\r\n")


@dataclass(slots=True)
class Seen:
    """What arrived. `events` counts token-bearing events of the window, `reads` what brought them."""

    begin_s: float = float("inf")
    end_s: float = float("inf")
    events: int = 0
    reads: int = 0
    answers: int = 0
    answer_events: int = 0
    answer_tokens: int = 0
    wrong_answers: int = 0
    connect_ms: list[float] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    itl_ms: list[float] = field(default_factory=list)


class Stream(asyncio.Protocol):
    """One kept-alive connection with one request at a time."""

    def __init__(self, plan: "Plan", seen: Seen, failed: asyncio.Future[None]) -> None:
        self._plan = plan
        self._seen = seen
        self._failed = failed
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._tail = b""
        self._whole: list[bytes] | None = None
        self._wanted = plan.first_tokens()
        self._answers = 0
        self._has_status = False
        self._events = 0
        self._sent_s = 0.0
        self._last_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._fail(f"the connection ended within an answer: {exc}")

    def send(self) -> None:
        if self._transport is not None:
            self._has_status, self._events, self._last_s = False, 0, 0.0
            self._sent_s = time.perf_counter()
            self._transport.write(self._plan.request(self._wanted))

    def begin(self) -> None:
        """Send when the time has come."""
        if think_s := self._plan.think():
            asyncio.get_running_loop().call_later(think_s, self.send)
        else:
            self.send()

    def close(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._rest:
            data, self._rest = self._rest + data, b""
        if not self._has_status and len(data) >= len(_OK):
            self._has_status = True
            if not data.startswith(_OK):
                self._fail(data[:500].decode(errors="replace"))
        if not data.endswith(b"\r\n"):  # within an event
            _, end, self._rest = data.rpartition(_EVENT_END)
            data = data[: len(data) - len(self._rest)] if end else b""
        if self._whole is not None:
            self._whole.append(data)
        if fresh := data.count(_TOKEN):
            self._note(now, fresh)
        self._tail = (self._tail + data)[-_TAIL:]
        if self._tail.endswith(_LAST):
            self._finish(self._tail)

    def _note(self, now: float, fresh: int) -> None:
        seen = self._seen
        self._events += fresh
        if seen.begin_s <= now <= seen.end_s:
            seen.events += fresh
            seen.reads += 1
            if self._last_s:
                seen.itl_ms.append((now - self._last_s) * 1e3)
            else:
                seen.ttft_ms.append((now - self._sent_s) * 1e3)
        self._last_s = now

    def _finish(self, end: bytes) -> None:
        self._tail = b""
        seen = self._seen
        usage = _COMPLETION_TOKENS.search(end)
        if usage is None:
            self._fail(f"no usage at the end: {end[-300:]!r}")
            return
        tokens = int(usage[1])
        seen.answers += 1
        seen.answer_events += self._events
        seen.answer_tokens += tokens
        is_wrong = tokens != self._wanted
        if self._whole is not None:
            is_wrong |= text_of(b"".join(self._whole)) != self._plan.text
        seen.wrong_answers += is_wrong
        self._answers += 1
        self._whole = [] if self._answers == 1 else None
        self._wanted = self._plan.max_tokens
        self.begin()

    def _fail(self, reason: str) -> None:
        if not self._failed.done():
            self._failed.set_exception(BadAnswer(reason))


@dataclass(frozen=True, slots=True)
class Plan:
    """What every stream asks, and the text it is to get."""

    request: Callable[[int], bytes]
    max_tokens: int
    text: str
    think: Callable[[], float]
    first_tokens: Callable[[], int]


def thinking(duties: dict[str, Any]) -> Callable[[], float]:
    """Seconds until a next request: uniform, the same in every run."""
    draw, most_s = random.Random(1), duties["think_s"]
    return lambda: draw.uniform(0.0, most_s)


def plan_of(duties: dict[str, Any]) -> Plan:
    body = {
        "model": duties["model"],
        "messages": [{"role": "user", "content": duties["prompt"]}],
        "stop": duties["stop"],
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }

    @cache
    def request(max_tokens: int) -> bytes:
        return post(duties["host"], "/v1/chat/completions", json.dumps(body | {"max_tokens": max_tokens}).encode())

    draw, most = random.Random(1), duties["max_tokens"]
    first_tokens = (lambda: draw.randint(1, most)) if duties["desynchronise"] else (lambda: most)
    return Plan(request, most, duties["text"], thinking(duties), first_tokens)


def text_of(answer: bytes) -> str:
    """The content of a chunked event stream, joined."""
    _, _, body = answer.partition(b"\r\n\r\n")
    parts = []
    for line in _CHUNK_BORDER.sub(b"\n", body).splitlines():
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:])["choices"]:
                parts.append(choice["delta"].get("content", ""))
    return "".join(parts)


async def _run(duties: dict[str, Any]) -> dict[str, Any]:
    seen, plan, loop = Seen(), plan_of(duties), asyncio.get_running_loop()
    failed: asyncio.Future[None] = loop.create_future()

    async def connected() -> Stream:
        began = time.perf_counter()
        _, stream = await loop.create_connection(lambda: Stream(plan, seen, failed), duties["host"], duties["port"])
        seen.connect_ms.append((time.perf_counter() - began) * 1e3)
        return stream

    streams = await asyncio.gather(*(connected() for _ in range(duties["streams"])))
    for stream in streams:
        stream.begin()
    await asyncio.wait({failed}, timeout=duties["warm_s"])
    say({"mark": "begin"})
    cpu_s = time.process_time()
    seen.begin_s = time.perf_counter()
    await asyncio.wait({failed}, timeout=duties["measure_s"])
    seen.end_s = time.perf_counter()
    cpu_s = time.process_time() - cpu_s
    say({"mark": "end"})
    for stream in streams:
        stream.close()
    if failed.done():
        failed.result()
    return result_of(seen, cpu_s)


def result_of(seen: Seen, cpu_s: float) -> dict[str, Any]:
    tokens_per_event = seen.answer_tokens / seen.answer_events if seen.answer_events else 1.0
    return {
        "window_s": seen.end_s - seen.begin_s,
        "client_cpu_s": cpu_s,
        "tokens": seen.events * tokens_per_event,
        "tokens_per_event": tokens_per_event,
        "events_per_read": seen.events / seen.reads if seen.reads else 0.0,
        "answers": seen.answers,
        "wrong_answers": seen.wrong_answers,
        "connect_ms": spread(seen.connect_ms),
        "ttft_ms": spread(seen.ttft_ms),
        "itl_ms": spread(seen.itl_ms),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Nearest-rank quantiles; zeros for no values."""
    ordered = sorted(values) or [0.0]
    last = len(ordered) - 1
    return {
        "count": len(values), "p50": ordered[round(0.5 * last)], "p99": ordered[round(0.99 * last)], "max": ordered[-1]
    }  # fmt: skip


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def main() -> None:
    duties = json.load(sys.stdin)
    try:
        result = uvloop.run(_run(duties))
    except (BadAnswer, OSError) as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    say(result)


if __name__ == "__main__":
    main()
