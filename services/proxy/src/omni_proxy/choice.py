"""One choice of an answer: a sequence's tokens as text, up to its stop string."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from omni_proxy.detokenize import Detokenizer
from omni_proxy.lifecycle import SequenceRun
from omni_proxy.ports import FinishReason, LogprobRow
from omni_proxy.sequence import TokenBatch
from omni_proxy.stops import StopMatcher


@dataclass(frozen=True, slots=True)
class TextRules:
    """What becomes of tokens on their way to the client."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class Piece:
    """Text that arrived together; the last piece has a finish reason, and `stop` if something asked for ended it."""

    text: str
    logprobs: Sequence[LogprobRow] = ()
    finish_reason: FinishReason | None = None
    stop: str | int | None = None


class Outlet(Protocol):
    """Takes a choice's text in the callback that brought its tokens. Nothing in it waits."""

    @property
    def is_open(self) -> bool:
        """Plain text can be taken now."""

    def show(self, text: str) -> None: ...


class Choice:
    """Drains one `SequenceRun`; `output_tokens` counts what the answer holds.

    With an `outlet`, plain text goes there while it is open, without waking the task that iterates `pieces`.
    """

    def __init__(self, index: int, run: SequenceRun, detokenizer: Detokenizer, rules: TextRules) -> None:
        self.index = index
        self.run = run
        self.outlet: Outlet | None = None
        self.output_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.text_s = 0.0
        self._detokenizer = detokenizer
        self._rules = rules
        self._matcher = StopMatcher(rules.stops, rules.include_stop) if rules.stops else None
        self._stopped: Piece | None = None
        self._failure: Exception | None = None

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Text as it comes. Close the iterator to abort the sequence."""
        show = None if self.outlet is None else self._show
        async with aclosing(self.run.stream(show)) as batches:
            async for batch in batches:
                if self._failure is not None:
                    raise self._failure
                began = time.perf_counter()
                piece = self._stopped or self._piece(batch)
                self.text_s += time.perf_counter() - began
                self.finish_reason = piece.finish_reason
                yield piece
                if piece.finish_reason is not None:
                    return

    def _show(self, token_ids: Sequence[int]) -> bool:
        """The sequence's `Show`. A refusal wakes `pieces`, which tells what a stop string or an error ended here."""
        outlet = self.outlet
        if outlet is None or not outlet.is_open or self._stopped is not None or self._failure is not None:
            return False
        try:
            began = time.perf_counter()
            text = self._text(token_ids, len(token_ids))
            self.text_s += time.perf_counter() - began
            if self._matcher is not None and self._matcher.matched is not None:
                self._stopped = Piece(text, (), FinishReason.STOP, self._matcher.matched)
                return False
            if text:
                outlet.show(text)
        except Exception as error:
            # Other sequences share the callback: an error ends only this one.
            self._failure = error
            return False
        self.run.sent(token_ids)
        return True

    def _piece(self, batch: TokenBatch) -> Piece:
        before, matcher = self.output_tokens, self._matcher
        text = self._text(batch.token_ids, self._num_shown(batch))
        if matcher is not None and matcher.matched is not None:
            rows = batch.logprobs[: self.output_tokens - before]
            return Piece(text, rows, FinishReason.STOP, matcher.matched)
        if batch.finish_reason is None:
            return Piece(text, batch.logprobs)
        rest = self._detokenizer.flush()
        if matcher is not None:
            rest = matcher.push(rest)
            if matcher.matched is not None:
                return Piece(text + rest, batch.logprobs, FinishReason.STOP, matcher.matched)
            rest += matcher.flush()
        last = batch.token_ids[-1] if batch.token_ids and batch.finish_reason is FinishReason.STOP else None
        stop = last if last in self._rules.stop_token_ids else None
        return Piece(text + rest, batch.logprobs, batch.finish_reason, stop)

    def _text(self, token_ids: Sequence[int], num_shown: int) -> str:
        """Text of the first `num_shown` tokens that no stop string can take back; counts all tokens.

        With stop strings it goes token by token, so that the token that completes one is the last one counted.
        """
        matcher, push = self._matcher, self._detokenizer.push
        if matcher is None:
            self.output_tokens += len(token_ids)
            return push(token_ids[:num_shown])
        parts = []
        for position in range(len(token_ids)):
            self.output_tokens += 1
            text = push(token_ids[position : position + 1]) if position < num_shown else ""
            if self.output_tokens > self._rules.min_tokens:
                text = matcher.push(text)
            parts.append(text)
            if matcher.matched is not None:
                break
        return "".join(parts)

    def _num_shown(self, batch: TokenBatch) -> int:
        """All tokens but an end token, which is not part of the text."""
        is_ended = batch.finish_reason is FinishReason.STOP and not self._rules.include_stop
        return max(0, len(batch.token_ids) - 1) if is_ended else len(batch.token_ids)
