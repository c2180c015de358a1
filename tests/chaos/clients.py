"""Clients that know the right answers: what each request came to, and whether it was what it claimed to be."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

CLIENT_TIMEOUT_S = 60.0
PAUSE_S = (0.0, 0.3)
ABANDONED = 0.08
# bf16 keeps 8 bits: two orders of summation may choose differently between tokens as close as this.
NEAR_TIE = 0.25
WORDS = ("river", "stone", "lantern", "market", "winter", "copper", "garden", "signal", "harbour", "thread", "meadow")


@dataclass(frozen=True, slots=True)
class Question:
    """A request without its form; the same question has one right answer."""

    prompt: str
    max_tokens: int
    sampling: tuple[tuple[str, float], ...]

    def body(self, model: str, **form: Any) -> dict[str, Any]:
        return {"model": model, "prompt": self.prompt, "max_tokens": self.max_tokens, **dict(self.sampling), **form}


@dataclass(frozen=True, slots=True)
class Answer:
    """`margins[i]` is the log-probability between the two best tokens where the one at `offsets[i]` was chosen."""

    text: str
    finish: str | None
    tokens: int
    offsets: Sequence[int] = ()
    margins: Sequence[float] = ()

    def differs(self, reference: "Answer") -> str | None:
        """None if the same; `near_tie` if the first difference is one that bf16 cannot tell; else `wrong`."""
        if (self.text, self.finish, self.tokens) == (reference.text, reference.finish, reference.tokens):
            return None
        at = self._parts_at(reference)
        return "near_tie" if min(reference.margins[at : at + 2], default=1.0) < NEAR_TIE else "wrong"

    def told_beside(self, reference: "Answer") -> str:
        """For people who look for the cause: where the two part, and how clear that token was."""
        same, at = self._same_until(reference), self._parts_at(reference)
        around = slice(max(0, same - 20), same + 40)
        margins = [round(margin, 2) for margin in reference.margins[max(0, at - 1) : at + 3]]
        ends = f"{self.finish} after {self.tokens} tokens, not {reference.finish} after {reference.tokens}"
        return f"{ends}; about token {at} {self.text[around]!r}, not {reference.text[around]!r}; margins {margins}"

    def _same_until(self, reference: "Answer") -> int:
        """Characters."""
        pairs = enumerate(zip(self.text, reference.text, strict=False))
        return next((i for i, (one, other) in pairs if one != other), min(len(self.text), len(reference.text)))

    def _parts_at(self, reference: "Answer") -> int:
        """The reference's token in which the texts differ first."""
        same = self._same_until(reference)
        return max((i for i, offset in enumerate(reference.offsets) if offset <= same), default=0)


def questions(seed: int, count: int, is_seeded: bool) -> list[Question]:
    """Some share their beginnings; a third of them are drawn with seeds where `is_seeded`."""
    rng = random.Random(seed)
    starts = [" ".join(rng.choices(WORDS, k=60)) for _ in range(4)]
    found = []
    for number in range(count):
        prompt = f"{rng.choice(starts)} {' '.join(rng.choices(WORDS, k=rng.randrange(5, 120)))} number {number}:"
        sampling: tuple[tuple[str, float], ...] = (("temperature", 0),)
        if is_seeded and number % 3 == 0:
            sampling = (("temperature", 1.0), ("seed", number))
        found.append(Question(prompt, rng.randrange(20, 120), sampling))
    return found


class Broken(Exception):
    """The answer did not come whole, and did not look as if it had. The argument names how."""


@dataclass(slots=True)
class Clients:
    """`count` clients of several proxies. `outcomes` counts by what a request came to; `ttft_s` of streams."""

    urls: Sequence[str]
    model: str
    count: int
    seed: int
    asked: Sequence[Question]
    right: dict[Question, Answer] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    ttft_s: list[float] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Of complete answers that were."""

    async def learn(self, *, margins: bool) -> None:
        """Ask every question while nothing goes wrong.

        With `margins` only those answered in ASCII are kept: parts of a character have no place in the text.
        """
        async with self._http() as http:
            for question in self.asked:
                form = {"logprobs": 2} if margins else {}
                reply = await http.post(f"{self.urls[0]}/v1/completions", json=question.body(self.model, **form))
                reply.raise_for_status()
                answer = _whole(reply.json())
                if not margins or answer.text.isascii():
                    self.right[question] = answer
        self.asked = list(self.right)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Requests follow each other until the block is left; those under way then end first."""
        stop = asyncio.Event()
        async with self._http() as http, asyncio.TaskGroup() as group:
            for index in range(self.count):
                group.create_task(self._client(random.Random(self.seed * 1000 + index), http, stop))
            try:
                yield
            finally:
                stop.set()

    async def _client(self, rng: random.Random, http: httpx.AsyncClient, stop: asyncio.Event) -> None:
        while not stop.is_set():
            question = rng.choice(self.asked)
            is_stream, leaves = rng.random() < 0.7, rng.random() < ABANDONED
            outcome = await self._outcome(http, rng, question, is_stream, leaves)
            self.outcomes[outcome] += 1
            if outcome.startswith("defect"):
                self.defects.append(f"{outcome}: {'streamed' if is_stream else 'whole'} {question.sampling}")
            await asyncio.sleep(rng.uniform(*PAUSE_S))

    async def _outcome(
        self, http: httpx.AsyncClient, rng: random.Random, question: Question, is_stream: bool, leaves: bool
    ) -> str:
        """complete | near_tie | abandoned | error: <which> | defect: <which>"""
        ask = self._streamed if is_stream else self._asked
        for url in rng.sample(self.urls, len(self.urls)):
            try:
                async with asyncio.timeout(CLIENT_TIMEOUT_S):
                    answer = await ask(http, url, question, rng.uniform(0.05, 1.0) if leaves else None)
            except httpx.ConnectError:
                self.outcomes["failover"] += 1
                continue
            except TimeoutError:
                return "defect: hang"
            except Broken as broken:
                return str(broken)
            except httpx.TransportError as error:
                return f"error: connection broken ({type(error).__name__})"
            if answer is None:
                return "abandoned"
            difference = answer.differs(self.right[question])
            if difference == "wrong":
                self.wrong.append(answer.told_beside(self.right[question]))
            return {None: "complete", "near_tie": "near_tie"}.get(difference, f"defect: {difference}")
        return "error: no proxy listens"

    async def _asked(
        self, http: httpx.AsyncClient, url: str, question: Question, leave_s: float | None
    ) -> Answer | None:
        try:
            async with asyncio.timeout(leave_s):
                reply = await http.post(f"{url}/v1/completions", json=question.body(self.model))
        except TimeoutError:
            if leave_s is None:
                raise
            return None
        if reply.status_code != 200:
            raise Broken(_error(reply.status_code, reply.content))
        return _whole(reply.json())

    async def _streamed(
        self, http: httpx.AsyncClient, url: str, question: Question, leave_s: float | None
    ) -> Answer | None:
        began = time.monotonic()
        form = {"stream": True, "stream_options": {"include_usage": True}}
        text, finish, usage = "", None, None
        async with http.stream("POST", f"{url}/v1/completions", json=question.body(self.model, **form)) as reply:
            if reply.status_code != 200:
                raise Broken(_error(reply.status_code, await reply.aread()))
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    break
                if not line.startswith("data: "):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise Broken(_error("in stream", line[6:].encode()))
                if not text:
                    self.ttft_s.append(time.monotonic() - began)
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    text += choice["text"]
                    finish = choice["finish_reason"] or finish
                if leave_s is not None and time.monotonic() - began > leave_s:
                    return None
            else:
                raise Broken("defect: ended without its last event")
        if finish is None or usage is None:
            raise Broken("defect: done without a finish reason or usage")
        return Answer(text, finish, usage["completion_tokens"])

    def _http(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_keepalive_connections=0)
        return httpx.AsyncClient(timeout=CLIENT_TIMEOUT_S, limits=limits, trust_env=False)


def _whole(reply: dict[str, Any]) -> Answer:
    choice, margins = reply["choices"][0], list[float]()
    found = choice.get("logprobs")
    for best in found["top_logprobs"] if found else ():
        ranked = sorted(best.values(), reverse=True)
        # Two tokens of one text (parts of a character) leave the margin unknown.
        margins.append(ranked[0] - ranked[1] if len(ranked) > 1 else 0.0)
    offsets = found["text_offset"] if found else ()
    return Answer(choice["text"], choice["finish_reason"], reply["usage"]["completion_tokens"], offsets, margins)


def _error(status: int | str, body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        return f"error: {status} {error['code'] or error['type']}"
    except (ValueError, KeyError, TypeError):
        return f"defect: {status} without an error body"
