"""The load process: `python -m sidebyside.load < plan.json`.

Closed-loop chat streams, and beside them, when asked, long prompts at a fixed rate (open loop). It prints one JSON
object per line: `{"mark": "begin"}` and `{"mark": "end"}` around the measured window, then the samples.
Latencies are of what arrived inside the window, in ms.
"""

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import uvloop

from sidebyside.wire import Answer, BadAnswer, post


@dataclass(slots=True)
class Samples:
    """What the window saw. A kind is `short` (the streams) or `long` (the open-loop prompts)."""

    begin_s: float = 0.0
    end_s: float = float("inf")
    ttft_ms: dict[str, list[float]] = field(default_factory=lambda: {"short": [], "long": []})
    itl_ms: list[float] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)
    window_events: dict[str, int] = field(default_factory=lambda: {"short": 0, "long": 0})
    done_requests: int = 0
    done_events: int = 0
    done_tokens: int = 0
    prompt_tokens: dict[str, list[int]] = field(default_factory=lambda: {"short": [], "long": []})
    wrong_lengths: int = 0
    skipped_arrivals: int = 0

    def covers(self, now: float) -> bool:
        return self.begin_s <= now <= self.end_s


class Stream(asyncio.Protocol):
    """One kept-alive connection with at most one request at a time."""

    def __init__(self, kind: str, samples: Samples, failed: asyncio.Future[None]) -> None:
        self._kind = kind
        self._samples = samples
        self._failed = failed
        self._transport: asyncio.Transport | None = None
        self._answer = Answer()
        self._wanted = 0
        self._sent_s = 0.0
        self._first_s = 0.0
        self._last_s = 0.0
        self._next: Iterator[tuple[bytes, int]] | None = None
        self.is_idle = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.is_idle and not self._failed.done():
            self._failed.set_exception(BadAnswer(f"the connection ended within an answer: {exc}"))

    def send(self, request: bytes, tokens: int) -> None:
        if self._transport is None:
            raise BadAnswer("not connected")
        self.is_idle = False
        self._answer = Answer()
        self._wanted = tokens
        self._first_s = self._last_s = 0.0
        self._sent_s = time.perf_counter()
        self._transport.write(request)

    def loop_over(self, requests: Iterator[tuple[bytes, int]]) -> None:
        """Closed loop: the next request follows the last answer at once."""
        self._next = requests
        self.send(*next(requests))

    def close(self) -> None:
        self.is_idle = True
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        try:
            fresh = self._answer.feed(data)
        except BadAnswer as error:
            if not self._failed.done():
                self._failed.set_exception(error)
            return
        if fresh:
            self._note(now, fresh)
        if self._answer.done:
            self._finish(now)

    def _note(self, now: float, fresh: int) -> None:
        samples = self._samples
        if samples.covers(now):
            samples.window_events[self._kind] += fresh
            if not self._last_s:
                samples.ttft_ms[self._kind].append((now - self._sent_s) * 1e3)
            elif self._kind == "short":
                samples.itl_ms.append((now - self._last_s) * 1e3)
        self._first_s = self._first_s or now
        self._last_s = now

    def _finish(self, now: float) -> None:
        answer, samples = self._answer, self._samples
        self.is_idle = True
        if self._kind == "short":
            samples.done_requests += 1
            samples.done_events += answer.token_events
            samples.done_tokens += answer.completion_tokens
            if samples.covers(now) and answer.completion_tokens > 1:
                samples.tpot_ms.append((self._last_s - self._first_s) * 1e3 / (answer.completion_tokens - 1))
        samples.prompt_tokens[self._kind].append(answer.prompt_tokens)
        samples.wrong_lengths += answer.completion_tokens != self._wanted
        if self._next is not None and now < samples.end_s:
            self.send(*next(self._next))


def requests_of(plan: dict[str, Any], kind: str) -> Iterator[tuple[bytes, int]]:
    """Every prompt of a kind, rendered before the clock starts; again from the start if they run out."""
    rendered = []
    for item in plan[kind]:
        body = {
            "model": plan["model"],
            "messages": [{"role": "user", "content": item["prompt"]}],
            "max_tokens": item["max_tokens"],
            "temperature": 0,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        rendered.append((post(plan["host"], "/v1/chat/completions", json.dumps(body).encode()), item["max_tokens"]))
    return itertools.cycle(rendered)


async def arrivals(plan: dict[str, Any], samples: Samples, failed: asyncio.Future[None]) -> None:
    """Long prompts at `long_rate_per_s`, each on an idle connection; none left means one arrival is skipped."""
    loop = asyncio.get_running_loop()
    requests = requests_of(plan, "long")
    streams = [await _connect(plan, "long", samples, failed) for _ in range(plan["long_connections"])]
    due_s = loop.time()
    try:
        while True:
            due_s += 1 / plan["long_rate_per_s"]
            await asyncio.sleep(due_s - loop.time())
            idle = next((s for s in streams if s.is_idle), None)
            if idle is None:
                samples.skipped_arrivals += 1
            else:
                idle.send(*next(requests))
    finally:
        for stream in streams:
            stream.close()


async def _connect(plan: dict[str, Any], kind: str, samples: Samples, failed: asyncio.Future[None]) -> Stream:
    loop = asyncio.get_running_loop()
    _, stream = await loop.create_connection(lambda: Stream(kind, samples, failed), plan["host"], plan["port"])
    return stream


async def _run(plan: dict[str, Any]) -> dict[str, Any]:
    samples = Samples(begin_s=float("inf"))
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    requests = requests_of(plan, "short")
    streams = [await _connect(plan, "short", samples, failed) for _ in range(plan["streams"])]
    for stream in streams:
        stream.loop_over(requests)
    background = asyncio.create_task(arrivals(plan, samples, failed)) if plan.get("long") else None
    await asyncio.wait({failed}, timeout=plan["warm_s"])
    _mark("begin")
    cpu_s = time.process_time()
    samples.begin_s = time.perf_counter()
    await asyncio.wait({failed}, timeout=plan["measure_s"])
    samples.end_s = time.perf_counter()
    cpu_s = time.process_time() - cpu_s
    _mark("end")
    if background is not None:
        background.cancel()
        await asyncio.gather(background, return_exceptions=True)
    for stream in streams:
        stream.close()
    if failed.done():
        failed.result()
    return _result(samples, cpu_s)


def _result(samples: Samples, cpu_s: float) -> dict[str, Any]:
    return {
        "window_s": samples.end_s - samples.begin_s,
        "client_cpu_s": cpu_s,
        "ttft_ms": {kind: _spread(values) for kind, values in samples.ttft_ms.items()},
        "itl_ms": _spread(samples.itl_ms),
        "tpot_ms": _spread(samples.tpot_ms),
        "window_events": samples.window_events,
        "done_requests": samples.done_requests,
        "tokens_per_event": samples.done_tokens / samples.done_events if samples.done_events else 1.0,
        "prompt_tokens": {k: sum(v) / len(v) if v else 0.0 for k, v in samples.prompt_tokens.items()},
        "wrong_lengths": samples.wrong_lengths,
        "skipped_arrivals": samples.skipped_arrivals,
    }


def _spread(values: list[float]) -> dict[str, float]:
    """Nearest-rank quantiles; zeros for no values."""
    ordered = sorted(values) or [0.0]
    last = len(ordered) - 1
    return {"count": len(values), "p50": ordered[round(0.5 * last)], "p99": ordered[round(0.99 * last)]}


def _mark(name: str) -> None:
    print(json.dumps({"mark": name}), flush=True)


def main() -> None:
    plan = json.load(sys.stdin)
    try:
        result = uvloop.run(_run(plan))
    except (BadAnswer, OSError) as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
