"""What a session has not sent yet: outputs of engine steps, packed into frames.

engine step -> pending lists -> next() -> one StepFrame     while fewer than `window` frames are unacknowledged
                              |
                              +-- window full: steps pile up and leave as one bigger frame
                              +-- more than `max_tokens` piled up: the session ends with ResourceExhausted
"""

import asyncio
from collections.abc import Sequence

from omni.decode.v1.decode_service_pb2 import (
    Rejected,
    SequenceFinish,
    SequenceLogprobs,
    SequenceStart,
    SessionResponse,
    StepFrame,
)
from omni_common.errors import OmniError, ResourceExhausted


class Outbox:
    """Bounded queue between the engine's steps and one stream; one writer takes from it."""

    def __init__(self, window: int, max_tokens: int) -> None:
        self._window = window
        self._max_tokens = max_tokens
        self._stream_ids: list[int] = []
        self._counts: list[int] = []
        self._token_ids: list[int] = []
        self._starts: list[SequenceStart] = []
        self._logprobs: list[SequenceLogprobs] = []
        self._finishes: list[SequenceFinish] = []
        self._rejected: list[Rejected] = []
        self._steps = 0
        self._sent = 0
        self._acked = 0
        self._wake = asyncio.Event()
        self._failure: OmniError | None = None
        self._is_closed = False

    def tokens(self, stream_id: int, token_ids: Sequence[int]) -> None:
        self._stream_ids.append(stream_id)
        self._counts.append(len(token_ids))
        self._token_ids.extend(token_ids)

    def start(self, message: SequenceStart) -> None:
        self._starts.append(message)

    def logprobs(self, message: SequenceLogprobs) -> None:
        self._logprobs.append(message)

    def finish(self, message: SequenceFinish) -> None:
        self._finishes.append(message)

    def reject(self, message: Rejected) -> None:
        self._rejected.append(message)
        self._check_bound()
        self._wake.set()

    def step_done(self) -> None:
        """Everything of one step was added; the writer may take it."""
        self._steps += 1
        self._check_bound()
        self._wake.set()

    def acknowledge(self, frame: int) -> None:
        """The peer has handled every frame up to `frame`."""
        self._acked = max(self._acked, min(frame, self._sent))
        self._wake.set()

    def fail(self, error: OmniError) -> None:
        """End the stream with an error; what is pending is dropped."""
        self._failure = self._failure or error
        self._wake.set()

    def close(self) -> None:
        """End the stream without an error."""
        self._is_closed = True
        self._wake.set()

    @property
    def is_over(self) -> bool:
        return self._is_closed or self._failure is not None

    async def next(self) -> SessionResponse | None:
        """The next message to send; None when the stream is over.

        Lasts as long as the session does: the channel's keepalive bounds it. Raises the error given to `fail`.
        """
        while True:
            if self._failure is not None:
                raise self._failure
            if self._is_closed:
                return None
            if self._rejected:
                return SessionResponse(rejected=self._rejected.pop(0))
            if self._steps and self._sent - self._acked < self._window:
                return SessionResponse(step=self._take())
            self._wake.clear()
            await self._wake.wait()

    def _check_bound(self) -> None:
        pending = len(self._token_ids) + len(self._rejected) + len(self._finishes)
        if pending > self._max_tokens:
            self.fail(ResourceExhausted(f"{pending} tokens wait for an acknowledgement", reason="session_overrun"))

    def _take(self) -> StepFrame:
        self._sent += 1
        if self._steps > 1:
            self._merge()
        frame = StepFrame(
            frame=self._sent,
            stream_ids=self._stream_ids,
            counts=() if len(self._token_ids) == len(self._stream_ids) else self._counts,
            token_ids=self._token_ids,
            starts=self._starts,
            logprobs=self._logprobs,
            finishes=self._finishes,
        )
        self._stream_ids, self._counts, self._token_ids = [], [], []
        self._starts, self._logprobs, self._finishes = [], [], []
        self._steps = 0
        return frame

    def _merge(self) -> None:
        """Several steps leave in one frame: one entry per sequence, its tokens in order."""
        by_stream: dict[int, list[int]] = {}
        offset = 0
        for stream_id, count in zip(self._stream_ids, self._counts, strict=True):
            by_stream.setdefault(stream_id, []).extend(self._token_ids[offset : offset + count])
            offset += count
        self._stream_ids = list(by_stream)
        self._counts = [len(tokens) for tokens in by_stream.values()]
        self._token_ids = [token for tokens in by_stream.values() for token in tokens]
