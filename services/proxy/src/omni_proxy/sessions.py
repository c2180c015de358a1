"""One multiplexed stream to a decode worker: submissions out, step frames in.

`run` owns the stream and opens it again when it breaks. A break gives every sequence on it an `End` with an error:
the worker aborts them all when the stream ends, so nothing is left there.
"""

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc

from omni.decode.v1 import decode_service_pb2 as pb
from omni.decode.v1 import decode_service_pb2_grpc
from omni_common.errors import Code, OmniError, Unavailable, error_of
from omni_common.rpc_errors import from_rpc_error
from omni_proxy.attempt import STALLED
from omni_proxy.backoff import Backoff
from omni_proxy.feed import End, Feed
from omni_proxy.metrics import Metrics
from omni_proxy.ports import FinishReason, Submission
from omni_proxy.stalls import StallWatch
from omni_proxy.wire import finish_from_wire, logprobs_from_wire, start_from_wire, submit_to_wire

log = logging.getLogger(__name__)

_MAX_OUTBOX = 65_536
_MAX_ACK_EVERY = 16
_DEADLINE_DETAIL = "deadline"
_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # missing from grpc's stubs


class DecodeSession:
    """The `DecodePort` of one worker."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        proxy_id: str,
        connect_timeout_s: float,
        metrics: Metrics,
        on_change: Callable[[], None],
        watch: StallWatch,
    ) -> None:
        self._stub: Any = decode_service_pb2_grpc.DecodeServiceStub(channel)  # type: ignore[no-untyped-call]
        self._proxy_id = proxy_id
        self._connect_timeout_s = connect_timeout_s
        self._metrics = metrics
        self._on_change = on_change
        self._watch = watch
        self._feeds: dict[int, Feed] = {}
        self._ids = itertools.count(1)
        self._outbox: deque[pb.SessionRequest] = deque()
        self._has_outgoing = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_ready = False
        self._ack_every = 1
        self._acked = 0
        self._last_frame_at: float | None = None

    @property
    def ready(self) -> bool:
        return self._is_ready

    @property
    def is_owed(self) -> bool:
        """Sequences run on it."""
        return bool(self._feeds)

    def abandon(self) -> None:
        """The worker has gone quiet: its sequences end here, and there once it hears of it."""
        feeds, self._feeds = self._feeds, {}
        if not feeds:
            return
        self._idle.set()
        self._metrics.aborts.inc(len(feeds))
        if known := [stream_id for stream_id, feed in feeds.items() if not feed.is_unsent]:
            self._send(pb.SessionRequest(abort=pb.Abort(stream_ids=known)))
        error = Unavailable("the decode worker has gone quiet", reason=STALLED)
        for feed in feeds.values():
            feed.finish(End(error=error))

    async def wait_idle(self) -> None:
        """Until no sequence is on the session."""
        await self._idle.wait()

    def submit(self, submission: Submission) -> Feed:
        if not self._is_ready or len(self._outbox) >= _MAX_OUTBOX:
            raise Unavailable("no session with the decode worker", reason="no_session")
        feed = Feed(next(self._ids))
        feed.is_unsent = True
        self._feeds[feed.stream_id] = feed
        self._idle.clear()
        self._watch.owes(submission.predicted_ms / 1e3)
        self._send(pb.SessionRequest(submit=submit_to_wire(feed.stream_id, submission)))
        return feed

    def abort(self, feed: Feed) -> None:
        if self._feeds.get(feed.stream_id) is not feed:
            return
        self._remove(feed.stream_id)
        self._metrics.aborts.inc()
        if not feed.is_unsent:
            self._send(pb.SessionRequest(abort=pb.Abort(stream_ids=[feed.stream_id])))

    async def run(self) -> None:
        """Keep a session open until cancelled."""
        backoff = Backoff()
        while True:
            try:
                await self._connection(backoff)
                log.info("decode session ended by the worker")
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                if backoff.is_first:
                    log.warning("decode session lost", extra={"error": _brief(error)})
            finally:
                self._break()
            await backoff.wait()

    async def _connection(self, backoff: Backoff) -> None:
        call = self._stub.Session()
        writer: asyncio.Task[None] | None = None
        try:
            await call.write(pb.SessionRequest(hello=pb.Hello(proxy_id=self._proxy_id)))
            async with asyncio.timeout(self._connect_timeout_s):
                first = await call.read()
            if first is _EOF or not first.HasField("welcome"):
                return
            self._open(first.welcome)
            backoff.reset()
            writer = asyncio.create_task(self._write(call))
            while (message := await call.read()) is not _EOF:
                self._received(message)
        finally:
            call.cancel()
            if writer is not None:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)

    def _open(self, welcome: pb.Welcome) -> None:
        window = welcome.frame_window
        self._ack_every = max(1, min(_MAX_ACK_EVERY, window // 2)) if window else _MAX_ACK_EVERY
        self._acked = 0
        self._last_frame_at = None
        self._is_ready = True
        self._on_change()

    def _break(self) -> None:
        self._is_ready = False
        self._outbox.clear()
        feeds, self._feeds = self._feeds, {}
        self._idle.set()
        error = Unavailable("the session with the decode worker broke", reason="session_broken")
        for feed in feeds.values():
            feed.finish(End(error=error))
        self._on_change()

    async def _write(self, call: Any) -> None:
        while True:
            while self._outbox:
                request = self._outbox.popleft()
                if request.HasField("submit"):
                    if (feed := self._feeds.get(request.submit.stream_id)) is None:
                        continue  # it ended before it left
                    feed.is_unsent = False
                await call.write(request)
            self._has_outgoing.clear()
            await self._has_outgoing.wait()

    def _send(self, request: pb.SessionRequest) -> None:
        self._outbox.append(request)
        self._has_outgoing.set()

    def _received(self, message: pb.SessionResponse) -> None:
        kind = message.WhichOneof("message")
        if kind == "step":
            self._on_frame(message.step)
        elif kind == "rejected":
            refused = message.rejected
            reason = "" if refused.code == Code.INVALID_ARGUMENT else "rejected"  # the caller's fault, not the worker's
            detail = refused.detail or "the decode worker refused"
            error = error_of(refused.code, detail, field=refused.field or None, reason=reason)
            self._finish(refused.stream_id, End(error=error, rejected=True))

    def _on_frame(self, frame: pb.StepFrame) -> None:
        """The hot path: one call per engine step, a few operations per token."""
        feeds = self._feeds
        was_busy = bool(feeds)
        for start in frame.starts:
            if (feed := feeds.get(start.stream_id)) is not None:
                feed.start = start_from_wire(start)
        for rows in frame.logprobs:
            if (feed := feeds.get(rows.stream_id)) is not None:
                feed.logprobs.extend(logprobs_from_wire(rows.logprobs))
        for finish in frame.finishes:
            # The last tokens are the writer's: whether the very last is text depends on why the sequence ended.
            if (feed := feeds.get(finish.stream_id)) is not None:
                feed.show = None
        if frame.counts:
            self._push_runs(frame)
        else:
            for stream_id, token_id in zip(frame.stream_ids, frame.token_ids, strict=True):
                if (feed := feeds.get(stream_id)) is not None:
                    feed.push((token_id,))
        for finish in frame.finishes:
            self._finish(finish.stream_id, _end_of(finish))
        if frame.frame - self._acked >= self._ack_every:
            self._acked = frame.frame
            self._send(pb.SessionRequest(ack=pb.Ack(frame=frame.frame)))
        self._watch.came()
        now = asyncio.get_running_loop().time()
        if self._last_frame_at is not None and was_busy:
            self._metrics.frame_gap.observe(now - self._last_frame_at)
        self._last_frame_at = now if feeds else None

    def _push_runs(self, frame: pb.StepFrame) -> None:
        tokens, at = list(frame.token_ids), 0
        for stream_id, count in zip(frame.stream_ids, frame.counts, strict=True):
            if (feed := self._feeds.get(stream_id)) is not None:
                feed.push(tokens[at : at + count])
            at += count

    def _finish(self, stream_id: int, end: End) -> None:
        if (feed := self._feeds.get(stream_id)) is not None:
            self._remove(stream_id)
            feed.finish(end)

    def _remove(self, stream_id: int) -> None:
        del self._feeds[stream_id]
        if not self._feeds:
            self._idle.set()


def _end_of(finish: pb.SequenceFinish) -> End:
    reason = finish_from_wire(finish.reason)
    if reason in (FinishReason.STOP, FinishReason.LENGTH):
        return End(reason)
    code = "DEADLINE_EXCEEDED" if finish.detail == _DEADLINE_DETAIL else "UNAVAILABLE"
    return End(reason, error_of(code, f"the decode engine ended the sequence ({reason})", reason="engine_error"))


def _brief(error: Exception) -> str:
    """Status and message of a failed call, without its debug text."""
    if isinstance(error, grpc.aio.AioRpcError):
        known: OmniError = from_rpc_error(error)
        return f"{known.code}: {known.message}"
    return type(error).__name__
