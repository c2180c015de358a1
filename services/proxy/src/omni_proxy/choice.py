"""One choice of an answer: a sequence's tokens as text, up to its stop string."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

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


@dataclass(slots=True)
class Piece:
    """Text that arrived together; the last piece has a finish reason."""

    text: str
    logprobs: Sequence[LogprobRow] = ()
    finish_reason: FinishReason | None = None
    stop: str | None = None


class Choice:
    """Drains one `SequenceRun`; `output_tokens` counts what the answer holds."""

    def __init__(self, index: int, run: SequenceRun, detokenizer: Detokenizer, rules: TextRules) -> None:
        self.index = index
        self.run = run
        self.output_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.text_s = 0.0
        self._detokenizer = detokenizer
        self._rules = rules
        self._matcher = StopMatcher(rules.stops, rules.include_stop) if rules.stops else None

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Text as it comes. Close the iterator to abort the sequence."""
        async with aclosing(self.run.stream()) as batches:
            async for batch in batches:
                began = time.perf_counter()
                piece = self._piece(batch)
                self.text_s += time.perf_counter() - began
                self.finish_reason = piece.finish_reason
                yield piece
                if piece.finish_reason is not None:
                    return

    def _piece(self, batch: TokenBatch) -> Piece:
        if self._matcher is not None:
            return self._matched_piece(batch, self._matcher)
        self.output_tokens += len(batch.token_ids)
        text = self._detokenizer.push(self._shown(batch))
        if batch.finish_reason is not None:
            text += self._detokenizer.flush()
        return Piece(text, batch.logprobs, batch.finish_reason)

    def _matched_piece(self, batch: TokenBatch, matcher: StopMatcher) -> Piece:
        """Token by token, so that the token that completes a stop string is the last one counted."""
        shown, parts = self._shown(batch), list[str]()
        for position, token_id in enumerate(batch.token_ids):
            self.output_tokens += 1
            text = self._detokenizer.push([token_id]) if position < len(shown) else ""
            if self.output_tokens <= self._rules.min_tokens:
                parts.append(text)
                continue
            parts.append(matcher.push(text))
            if matcher.matched is not None:
                return Piece("".join(parts), batch.logprobs[: position + 1], FinishReason.STOP, matcher.matched)
        if batch.finish_reason is not None:
            parts.append(matcher.push(self._detokenizer.flush()))
            if matcher.matched is not None:
                return Piece("".join(parts), batch.logprobs, FinishReason.STOP, matcher.matched)
            parts.append(matcher.flush())
        return Piece("".join(parts), batch.logprobs, batch.finish_reason)

    def _shown(self, batch: TokenBatch) -> Sequence[int]:
        """All tokens but an end token, which is not part of the text."""
        if batch.finish_reason is FinishReason.STOP and not self._rules.include_stop:
            return batch.token_ids[:-1]
        return batch.token_ids
