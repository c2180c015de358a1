"""The load: streamed completions at given moments, whoever is slow (open loop). Costs little per token.

Gaps between tokens are between reads that brought some; a request's mean gap is from its first token to its last.
"""

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sidebyside.wire import post

_TEXT = re.compile(rb'"text":\s*"(?!")')
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
_CACHED_TOKENS = re.compile(rb'"cached_tokens":\s*(\d+)')
_MESSAGE = re.compile(rb'"message":\s*"([^"]*)"')
_READ_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Order:
    """One request: when it is sent, its body, and how many tokens its answer must have."""

    at_s: float
    body: bytes
    prompt_tokens: int
    output_tokens: int
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Answer:
    """Times in milliseconds. `error` is empty where all tokens came."""

    prompt_tokens: int
    output_tokens: int
    ttft_ms: float = 0.0
    last_ms: float = 0.0
    gaps_ms: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    late_ms: float = 0.0
    """Of the sending, behind its moment."""
    error: str = ""

    @property
    def itl_ms(self) -> float:
        """Mean gap; 0 for one token."""
        return (self.last_ms - self.ttft_ms) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


def body_of(model: str, token_ids: Sequence[int], output_tokens: int) -> bytes:
    body = {
        "model": model,
        "prompt": list(token_ids),
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body).encode()


async def replay(port: int, orders: Sequence[Order], at_order: Callable[[int], None], timeout_s: float) -> list[Answer]:
    """Send each order at its moment and wait for all answers. `at_order` hears the number of each before it is sent."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    running: list[asyncio.Task[Answer]] = []
    for number, order in enumerate(orders):
        await asyncio.sleep(began_s + order.at_s - loop.time())
        at_order(number)
        late_ms = (loop.time() - began_s - order.at_s) * 1e3
        running.append(asyncio.create_task(_ask(port, order, late_ms, timeout_s)))
    return await asyncio.gather(*running)


async def _ask(port: int, order: Order, late_ms: float, timeout_s: float) -> Answer:
    answer = Answer(order.prompt_tokens, order.output_tokens, late_ms=late_ms)
    try:
        async with asyncio.timeout(timeout_s):
            await _stream(port, order, answer)
    except TimeoutError:
        answer.error = "timeout"
    except OSError as error:
        answer.error = type(error).__name__
    return answer


async def _stream(port: int, order: Order, answer: Answer) -> None:
    clock = asyncio.get_running_loop().time
    sent_s = clock()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_READ_BYTES)
    try:
        writer.write(post("127.0.0.1", "/v1/completions", order.body, order.headers))
        await writer.drain()
        data = head = await reader.read(_READ_BYTES)
        before = b""
        while data:
            _note(answer, data, (clock() - sent_s) * 1e3)
            if (before + data).endswith(b"0\r\n\r\n") or not head.startswith(b"HTTP/1.1 200"):
                break
            before, data = data, await reader.read(_READ_BYTES)
        _check(answer, head, before + data)
    finally:
        writer.transport.abort()


def _note(answer: Answer, data: bytes, now_ms: float) -> None:
    if _TEXT.search(data):
        if answer.ttft_ms:
            answer.gaps_ms.append(now_ms - answer.last_ms)
        else:
            answer.ttft_ms = now_ms
        answer.last_ms = now_ms


def _check(answer: Answer, head: bytes, end: bytes) -> None:
    """`end`: the last two reads."""
    if not head.startswith(b"HTTP/1.1 200"):
        said = _MESSAGE.search(head + end)
        status = head.split(b"\r\n", 1)[0].decode(errors="replace") or "no answer"
        answer.error = f"{status}: {said[1].decode(errors='replace')}" if said else status
        return
    tokens, cached = _COMPLETION_TOKENS.search(end), _CACHED_TOKENS.search(end)
    if tokens is None or int(tokens[1]) != answer.output_tokens:
        answer.error = "another length"
    elif cached is not None:
        answer.cached_tokens = int(cached[1])
