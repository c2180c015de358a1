"""One request's sequences, run together: n choices of each prompt, one record of what happened."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from omni_common.errors import OmniError
from omni_proxy.choice import Choice, Piece
from omni_proxy.explain import DECISION_HEADER, Explained, header_value
from omni_proxy.lifecycle import SequenceRun
from omni_proxy.openai_answers import Usage
from omni_proxy.openai_requests import Options
from omni_proxy.scheduling.request import NOBODY, Caller
from omni_proxy.sequence import Scheduler, SequenceJob
from omni_proxy.text import ModelText
from omni_proxy.tracing import RequestTrace

OnPiece = Callable[[Choice, Piece], Awaitable[None]]


@dataclass(slots=True)
class Clock:
    """Instants of one request on the monotonic clock, in seconds."""

    arrived: float
    first_piece: float | None = None


class Generation:
    """Choices are indexed prompt by prompt: prompt p's i-th choice is p * n + i."""

    def __init__(
        self,
        scheduler: Scheduler,
        text: ModelText,
        options: Options,
        prompts: Sequence[Sequence[int]],
        max_tokens: Sequence[int],
        request_id: str,
        timeout_s: float,
        trace: RequestTrace,
        caller: Caller = NOBODY,
        explains: bool = False,
        rate_headers: Mapping[str, str] | None = None,
        show_marks: bool = False,
    ) -> None:
        self.request_id = request_id
        self.caller = caller
        self._arrived = asyncio.get_running_loop().time()
        self.deadline = self._arrived + timeout_s
        self.clock = Clock(time.perf_counter())
        self._metrics = scheduler.metrics
        self._trace = trace
        self._n = options.n
        self._prompts = prompts
        self._show_marks = show_marks
        # A client may send the same request id twice; engines need distinct ones.
        stem = f"{request_id}-{secrets.token_hex(4)}"
        self.choices = [
            self._choice(scheduler, text, options, f"{stem}-{i}", i, max_tokens[i // options.n])
            for i in range(options.n * len(prompts))
        ]
        self._explains = explains
        self._rate_headers = rate_headers or {}
        self._adapter = options.adapter
        records = [choice.run.record for choice in self.choices]
        self._explained = Explained(request_id, records, caller.tenant, caller.priority, options.adapter)
        scheduler.explanations.begin(self._explained)

    def headers(self) -> dict[str, str]:
        """Of an answer, as far as the request has come."""
        headers = {"x-request-id": self.request_id, **self._rate_headers}
        if self._explains:
            headers[DECISION_HEADER] = header_value(self.choices[0].run.record)
        return headers

    async def run(self, on_piece: OnPiece) -> None:
        """Hand every piece to `on_piece`, in order within a choice. Cancelling aborts all sequences.

        Raises:
            OmniError: a choice failed; the others are aborted.
        """
        if len(self.choices) == 1:
            await self._drain(self.choices[0], on_piece, None)
            return
        try:
            async with asyncio.TaskGroup() as tasks:
                for start in range(0, len(self.choices), self._n):
                    is_primed = asyncio.Event()
                    first, *others = self.choices[start : start + self._n]
                    tasks.create_task(self._drain(first, on_piece, is_primed))
                    for choice in others:
                        tasks.create_task(self._drain_after(is_primed, choice, on_piece))
        except* OmniError as group:
            raise _first(group) from None

    def usage(self) -> Usage:
        """Of what workers were given: a prompt that was refused before has used nothing."""
        sent = {choice.index // self._n for choice in self.choices if choice.run.record.decisions}
        prompt = sum(len(self._prompts[index]) for index in sent)
        cached = sum(choice.run.record.cached_tokens for choice in self.choices[:: self._n])
        return Usage(prompt, sum(choice.output_tokens for choice in self.choices), cached)

    def usage_of(self, choice: Choice) -> Usage:
        prompt = len(self._prompts[choice.index // self._n])
        return Usage(prompt, choice.output_tokens, choice.run.record.cached_tokens)

    def finished(self, status: int, model: str, error: OmniError | None) -> None:
        """Write the metrics, complete the explanation and end the root span."""
        usage, now = self.usage(), time.perf_counter()
        ttft = (self.clock.first_piece or now) - self.clock.arrived
        self._write_metrics(status, usage, now)
        self._explained.ended(
            status,
            error,
            {
                "first_token_ms": None if self.clock.first_piece is None else round(ttft * 1e3, 3),
                "e2e_ms": round((now - self.clock.arrived) * 1e3, 3),
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "cached_tokens": usage.cached_tokens,
            },
        )
        self._trace.end(
            lambda: (
                self.choices[0].run.record.attributes()
                | {
                    "omni.request_id": self.request_id,
                    "omni.model": model,
                    **({"omni.adapter": self._adapter} if self._adapter else {}),
                    "omni.choices": len(self.choices),
                    "omni.prompt_tokens": usage.prompt_tokens,
                    "omni.uncached_tokens": usage.prompt_tokens - usage.cached_tokens,
                    "omni.output_tokens": usage.completion_tokens,
                    "omni.ttft_ms": ttft * 1e3,
                    "omni.e2e_ms": (now - self.clock.arrived) * 1e3,
                    "omni.finish_reason": self.choices[0].finish_reason or (error.code if error else "aborted"),
                    "http.response.status_code": status,
                }
            ),
            None if error is None else error.code,
        )

    def _write_metrics(self, status: int, usage: Usage, now: float) -> None:
        metrics, clock, exemplar = self._metrics, self.clock, self._trace.exemplar
        metrics.requests.labels(str(status)).inc()
        if self._adapter:
            metrics.adapter_requests.labels(self._adapter).inc()
        metrics.e2e.observe(now - clock.arrived, exemplar)
        if clock.first_piece is not None:
            metrics.ttft.observe(clock.first_piece - clock.arrived, exemplar)
        metrics.prompt_tokens.inc(usage.prompt_tokens)
        metrics.cached_tokens.inc(usage.cached_tokens)
        metrics.output_tokens.inc(usage.completion_tokens)
        metrics.text_seconds.inc(sum(choice.text_s for choice in self.choices))
        metrics.tenants.used(self.caller.tenant, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
        for choice in self.choices:
            metrics.phases.observe(choice.run.record.phases(), exemplar)

    async def _drain(self, choice: Choice, on_piece: OnPiece, is_primed: asyncio.Event | None) -> None:
        try:
            async with aclosing(choice.pieces()) as pieces:
                async for piece in pieces:
                    if self.clock.first_piece is None:
                        self.clock.first_piece = time.perf_counter()
                    if is_primed is not None:
                        is_primed.set()
                    await on_piece(choice, piece)
        finally:
            if is_primed is not None:
                is_primed.set()

    async def _drain_after(self, is_primed: asyncio.Event, choice: Choice, on_piece: OnPiece) -> None:
        """Later choices of a prompt find its blocks in the prefix cache once the first has been prefilled."""
        await is_primed.wait()
        await self._drain(choice, on_piece, None)

    def _choice(
        self,
        scheduler: Scheduler,
        text: ModelText,
        options: Options,
        sequence_id: str,
        index: int,
        max_tokens: int,
    ) -> Choice:
        prompt = self._prompts[index // self._n]
        seed = options.sampling.seed
        if seed is not None:
            # Wraps within int64, so that the largest seed has choices too.
            seed = (seed + index % self._n + 2**63) % 2**64 - 2**63
        sampling = replace(options.sampling, max_tokens=max_tokens, seed=seed)
        job = SequenceJob(
            sequence_id,
            prompt,
            sampling,
            self.deadline,
            self.caller,
            self._arrived,
            options.cache_salt,
            options.adapter,
        )
        run = SequenceRun(scheduler, job, self._trace)
        detokenizer = text.detokenizer(skip_special_tokens=options.skip_special_tokens, show_marks=self._show_marks)
        return Choice(index, run, detokenizer, options.rules)


def token_limits(options: Options, lengths: Sequence[int], max_model_len: int | None) -> list[int]:
    """`max_tokens` per prompt: what was asked for, within the model's length."""
    limits: Mapping[int, int] = {n: max(1, max_model_len - n) for n in lengths} if max_model_len else {}
    wanted = options.max_tokens or 2**31
    return [min(wanted, limits.get(length, wanted)) for length in lengths]


def _first(group: BaseExceptionGroup[OmniError]) -> OmniError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, OmniError)
    return error
