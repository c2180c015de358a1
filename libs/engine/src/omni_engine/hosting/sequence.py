"""One sequence of a session: its names, its timer, its share of the load, and the span that tells its life."""

import asyncio
import time

from opentelemetry import propagate, trace

from omni.decode.v1.decode_service_pb2 import Submit
from omni_engine.hosting.accounts import Share
from omni_engine.ports import SequenceStart


class SessionSequence:
    """From Submit to its last output. `engine_id` is unique among all sessions of the worker."""

    __slots__ = (
        "_first_token_ms",
        "_share",
        "_span",
        "_start",
        "_submitted_s",
        "engine_id",
        "has_ended",
        "output_tokens",
        "prompt_tokens",
        "stream_id",
        "timer",
    )

    def __init__(self, submit: Submit, engine_id: str, worker_id: str, share: Share) -> None:
        """Closes `share` at the end."""
        self.stream_id = submit.stream_id
        self.engine_id = engine_id
        self.prompt_tokens = len(submit.token_ids)
        self.output_tokens = 0
        self.timer: asyncio.TimerHandle | None = None
        self.has_ended = False
        self._share = share
        self._submitted_s = time.monotonic()
        self._first_token_ms = 0.0
        self._start: SequenceStart | None = None
        parent = propagate.extract({"traceparent": submit.traceparent}) if submit.traceparent else None
        self._span = trace.get_tracer("omni.hosting").start_span(
            "decode.sequence",
            context=parent,
            attributes={"omni.worker_id": worker_id, "omni.request_id": submit.request_id},
        )
        if submit.adapter:
            self._span.set_attribute("omni.adapter", submit.adapter)

    def started(self, start: SequenceStart) -> None:
        """With its first token."""
        self._share.computed(self.prompt_tokens - start.cached_tokens)
        self._start = start
        self._first_token_ms = (time.monotonic() - self._submitted_s) * 1e3

    def end(self, reason: str, detail: str = "") -> None:
        """Close the share, stop the timer and end the span."""
        self.has_ended = True
        self._share.close()
        if self.timer is not None:
            self.timer.cancel()
        span = self._span
        if span.is_recording():
            span.set_attributes({"omni.output_tokens": self.output_tokens, "omni.finish_reason": reason})
            if self._start is not None:
                self._describe_start(span, self._start)
            if reason == "error":
                span.set_status(trace.StatusCode.ERROR, detail)
        span.end()

    def _describe_start(self, span: trace.Span, start: SequenceStart) -> None:
        span.set_attributes(
            {
                "omni.prompt_tokens": self.prompt_tokens,
                "omni.cached_tokens": start.cached_tokens,
                "omni.pulled_tokens": start.pulled_tokens,
                "omni.fell_back": start.fell_back,
                "omni.queue_ms": start.timings.queue_ms,
                "omni.compute_ms": start.timings.compute_ms,
                "omni.transfer_ms": start.timings.transfer_ms,
                "omni.ttft_ms": self._first_token_ms,
            }
        )
