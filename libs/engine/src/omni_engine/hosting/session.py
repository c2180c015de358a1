"""DecodeService over an engine: one stream per proxy carries all of its sequences."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from omni.decode.v1.decode_service_pb2 import (
    Rejected,
    SequenceFinish,
    SequenceLogprobs,
    SequenceStart,
    SessionRequest,
    SessionResponse,
    Submit,
    Welcome,
)
from omni.decode.v1.decode_service_pb2_grpc import DecodeServiceServicer
from omni_common.errors import DeadlineExceeded, InvalidRequest, OmniError, Unavailable
from omni_engine.hosting.accounts import Accounts
from omni_engine.hosting.admission import Admission
from omni_engine.hosting.background import Background
from omni_engine.hosting.identity import Identity
from omni_engine.hosting.metrics import WorkerMetrics
from omni_engine.hosting.outbox import Outbox
from omni_engine.hosting.sequence import SessionSequence
from omni_engine.hosting.wire import (
    FINISH_REASONS,
    handle_from_wire,
    logprobs_to_wire,
    require_tokens,
    sampling_from_wire,
    timings_to_wire,
)
from omni_engine.ports import DecodeJob, Engine, FinishReason, SequenceOutput

log = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Bounds of one session; `submit_timeout_s` is how long the engine may take to accept a sequence."""

    frame_window: int
    max_pending_tokens: int
    submit_timeout_s: float


@dataclass(frozen=True, slots=True)
class DecodeHost:
    """What all sessions of a worker share."""

    engine: Engine
    admission: Admission
    accounts: Accounts
    background: Background
    metrics: WorkerMetrics
    identity: Identity
    limits: SessionLimits


class DecodeServicer(DecodeServiceServicer):
    """Wire edge of `Engine.submit` and `Engine.abort`."""

    def __init__(self, host: DecodeHost) -> None:
        self._host = host
        self._numbers = itertools.count(1)

    async def Session(self, requests: AsyncIterator[SessionRequest], context: Any) -> AsyncIterator[SessionResponse]:
        proxy_id = await _expect_hello(requests)
        identity, limits = self._host.identity, self._host.limits
        session = Session(self._host, next(self._numbers), proxy_id)
        # A generator that is suspended in a write is not resumed when its call is cancelled.
        context.add_done_callback(lambda _: session.close())
        reader = asyncio.create_task(session.read(requests), name="session-reader")
        try:
            yield SessionResponse(
                welcome=Welcome(worker_id=identity.worker_id, epoch=identity.epoch, frame_window=limits.frame_window)
            )
            while (response := await session.outbox.next()) is not None:
                yield response
        finally:
            reader.cancel()
            session.close()


class Session:
    """The sequences of one stream; its `_on_step` is the sink of all of them."""

    def __init__(self, host: DecodeHost, number: int, proxy_id: str) -> None:
        self._host = host
        self._number = number
        self._proxy_id = proxy_id
        self._by_stream: dict[int, SessionSequence] = {}
        self._by_engine: dict[str, SessionSequence] = {}
        self.outbox = Outbox(host.limits.frame_window, host.limits.max_pending_tokens)

    async def read(self, requests: AsyncIterator[SessionRequest]) -> None:
        """Handle the client's messages until it ends the stream, or the session is over: a client that reads nothing
        does not hear of it, and gRPC holds back what it sends."""
        try:
            async for message in requests:
                await self._handle(message)
                if self.outbox.is_over:
                    return
            self.outbox.close()
        except OmniError as error:
            self.outbox.fail(error)
        except Exception:
            self.outbox.fail(Unavailable("the session's requests cannot be read", reason="session_broken"))
            raise

    async def _handle(self, message: SessionRequest) -> None:
        match message.WhichOneof("message"):
            case "submit":
                await self._submit(message.submit)
            case "ack":
                self.outbox.acknowledge(message.ack.frame)
            case "abort":
                ids = dict.fromkeys(message.abort.stream_ids)
                self._abort([s for i in ids if (s := self._by_stream.get(i)) is not None], "client")
            case other:
                raise InvalidRequest(f"unexpected message {other!r} in a session", field="message")

    def close(self) -> None:
        """Abort everything; the stream is over."""
        self.outbox.close()
        self._abort(list(self._by_stream.values()), "session_ended")

    async def _submit(self, submit: Submit) -> None:
        try:
            job = self._accept(submit)
        except OmniError as error:
            self._reject(submit.stream_id, error)
            return
        sequence = self._register(submit, job)
        try:
            async with asyncio.timeout(self._host.limits.submit_timeout_s):
                await self._host.engine.submit(job, self._on_step)
        except TimeoutError:
            self._fail(sequence, "engine_slow")
        except OmniError as error:
            self._refuse(sequence, error)
        except Exception:  # of this sequence alone; the others go on
            log.exception("the engine failed at a sequence")
            self._fail(sequence, "engine_failed")
        if sequence.has_ended:
            # Its end came while the engine was accepting it, so that abort may have found nothing.
            self._host.background.spawn(self._host.engine.abort([job.request_id]), "abort-late")

    def _accept(self, submit: Submit) -> DecodeJob:
        if submit.stream_id in self._by_stream:
            raise InvalidRequest(f"stream_id {submit.stream_id} is in use", field="stream_id")
        self._host.admission.check(submit.model, "decode", submit.adapter)
        tokens = require_tokens(submit.token_ids)
        if submit.num_output_tokens >= len(tokens):
            raise InvalidRequest("num_output_tokens leaves no prompt", field="num_output_tokens")
        return DecodeJob(
            request_id=f"{submit.request_id}@{self._number}.{submit.stream_id}",
            token_ids=tokens,
            sampling=sampling_from_wire(submit.sampling),
            num_output_tokens=submit.num_output_tokens,
            kv_handle=handle_from_wire(submit.kv_handle) if submit.HasField("kv_handle") else None,
            cache_salt=submit.cache_salt,
            uncached_tokens=submit.uncached_tokens if submit.HasField("uncached_tokens") else None,
            adapter=submit.adapter,
        )

    def _register(self, submit: Submit, job: DecodeJob) -> SessionSequence:
        share = self._host.accounts.sequence(self._proxy_id, job.believed_tokens, pulls=job.kv_handle is not None)
        sequence = SessionSequence(submit, job.request_id, self._host.identity.worker_id, share)
        self._by_stream[sequence.stream_id] = self._by_engine[sequence.engine_id] = sequence
        self._host.admission.enter()
        if submit.deadline_ms:
            loop = asyncio.get_running_loop()
            sequence.timer = loop.call_later(submit.deadline_ms / 1e3, self._on_deadline, sequence)
        return sequence

    def _on_step(self, outputs: list[SequenceOutput]) -> None:
        """Hot path: called once per engine step with this session's outputs."""
        outbox, by_engine = self.outbox, self._by_engine
        for output in outputs:
            sequence = by_engine.get(output.request_id)
            if sequence is None:
                continue
            token_ids = output.token_ids
            if token_ids:
                outbox.tokens(sequence.stream_id, token_ids)
                sequence.output_tokens += len(token_ids)
            if output.start is not None or output.logprobs is not None or output.finish_reason is not None:
                self._note(sequence, output)
        outbox.step_done()
        if outbox.is_over:
            self._overrun()

    def _note(self, sequence: SessionSequence, output: SequenceOutput) -> None:
        """The rarer parts of an output."""
        stream_id, start = sequence.stream_id, output.start
        if start is not None:
            sequence.started(start)
            self._host.metrics.sequence_started(start, sequence.prompt_tokens)
            self.outbox.start(
                SequenceStart(
                    stream_id=stream_id,
                    cached_tokens=start.cached_tokens,
                    pulled_tokens=start.pulled_tokens,
                    fell_back=start.fell_back,
                    timings=timings_to_wire(start.timings),
                )
            )
        if output.logprobs is not None:
            self.outbox.logprobs(SequenceLogprobs(stream_id=stream_id, logprobs=logprobs_to_wire(output.logprobs)))
        if output.finish_reason is not None:
            self._finish(sequence, output.finish_reason, output.detail)

    def _finish(self, sequence: SessionSequence, reason: FinishReason, detail: str) -> None:
        message = SequenceFinish(stream_id=sequence.stream_id, reason=FINISH_REASONS[reason], detail=detail)
        self.outbox.finish(message)
        self._forget(sequence, reason.value, detail)

    def _on_deadline(self, sequence: SessionSequence) -> None:
        self._host.metrics.aborted("deadline")
        self._fail(sequence, "deadline")
        self._host.background.spawn(self._host.engine.abort([sequence.engine_id]), "abort-deadline")

    def _abort(self, sequences: list[SessionSequence], cause: str) -> None:
        if not sequences:
            return
        self._host.metrics.aborted(cause, len(sequences))
        for sequence in sequences:
            self._forget(sequence, "abort")
        self._host.background.spawn(self._host.engine.abort([s.engine_id for s in sequences]), f"abort-{cause}")

    def _overrun(self) -> None:
        self._host.metrics.session_overrun()
        self._abort(list(self._by_stream.values()), "session_overrun")

    def _fail(self, sequence: SessionSequence, detail: str) -> None:
        """End one that the engine may have taken, and may read blocks for."""
        if not sequence.has_ended:
            self._finish(sequence, FinishReason.ERROR, detail)
            self.outbox.step_done()

    def _refuse(self, sequence: SessionSequence, error: OmniError) -> None:
        if not sequence.has_ended:
            self._forget(sequence, "error", error.code)
            self._reject(sequence.stream_id, error)

    def _reject(self, stream_id: int, error: OmniError) -> None:
        field = error.field or ""
        self.outbox.reject(Rejected(stream_id=stream_id, code=error.code, detail=error.message, field=field))

    def _forget(self, sequence: SessionSequence, reason: str, detail: str = "") -> None:
        del self._by_stream[sequence.stream_id], self._by_engine[sequence.engine_id]
        self._host.admission.leave()
        sequence.end(reason, detail)


async def _expect_hello(requests: AsyncIterator[SessionRequest]) -> str:
    """The client's name."""
    try:
        async with asyncio.timeout(_HELLO_TIMEOUT_S):
            message = await anext(requests, None)
    except TimeoutError:
        raise DeadlineExceeded(f"no hello within {_HELLO_TIMEOUT_S:.0f} s", reason="silent") from None
    if message is None or message.WhichOneof("message") != "hello":
        raise InvalidRequest("a session begins with hello", field="hello")
    return message.hello.proxy_id
