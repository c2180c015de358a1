"""The tokens of one running sequence between the session that receives them and the writer that waits.

One writer waits on a feed; the session fills it from the step frames and wakes it once per frame. Waking a task costs
more than showing a token does, so a writer may leave a function behind that shows plain tokens while it waits.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omni_common.errors import OmniError

if TYPE_CHECKING:
    from omni_proxy.ports import FinishReason, LogprobRow, SequenceStart


@dataclass(frozen=True, slots=True)
class End:
    """How a feed ended: a finish reason of the engine, or the error that broke the leg.

    `rejected` tells a refused submission from a leg that broke while it ran.
    """

    finish_reason: "FinishReason | None" = None
    error: OmniError | None = None
    rejected: bool = False


# Shows tokens and returns True, or returns False and leaves them to the writer. It neither waits nor raises.
Show = Callable[[Sequence[int]], bool]


class Feed:
    """Filled by one session, drained by one writer. `tokens` is bounded by the sequence's max_tokens.

    `show` is asked only while the writer waits, which keeps tokens in order, and only about tokens that come with
    neither a start nor log-probabilities nor an end. While `is_unsent` the worker cannot know of the sequence.
    """

    __slots__ = ("_waiter", "end", "is_unsent", "logprobs", "show", "start", "stream_id", "tokens")

    def __init__(self, stream_id: int) -> None:
        self.stream_id = stream_id
        self.tokens: list[int] = []
        self.logprobs: list[LogprobRow] = []
        self.start: SequenceStart | None = None
        self.end: End | None = None
        self.is_unsent = False
        self.show: Show | None = None
        self._waiter: asyncio.Future[None] | None = None

    def push(self, tokens: Sequence[int]) -> None:
        """Tokens of one step, shown at once or left to the writer."""
        show, waiter = self.show, self._waiter
        is_plain = self.start is None and not self.logprobs
        if show is None or not is_plain or waiter is None or waiter.done() or not show(tokens):
            self.tokens.extend(tokens)
            self.wake()

    def wake(self) -> None:
        """Let the writer run after the current callback."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def finish(self, end: End) -> None:
        self.end = end
        self.wake()

    async def wait(self) -> None:
        """Until there are tokens or an end."""
        while not self.tokens and self.end is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def take(self) -> "tuple[list[int], Sequence[LogprobRow]]":
        """All tokens so far, and their log-probabilities where asked for."""
        tokens, rows = self.tokens, self.logprobs
        self.tokens = []
        if rows:
            self.logprobs = []
        return tokens, rows
