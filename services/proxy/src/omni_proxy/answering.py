"""From a generation's pieces to an HTTP answer, as raw ASGI messages."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
from starlette.types import Receive, Scope, Send

from omni_common.errors import Cancelled, DeadlineExceeded, Internal, OmniError
from omni_proxy.choice import Choice, Piece
from omni_proxy.eager_send import EagerSend
from omni_proxy.generation import Generation
from omni_proxy.openai_answers import DONE, Envelope, Events, Usage, WholeChoice, usage_event
from omni_proxy.openai_errors import error_body, error_event, error_headers, status_of
from omni_proxy.output_parser import OutputParser, Parts, Reading
from omni_proxy.ports import FinishReason, LogprobRow

log = logging.getLogger(__name__)

_LAST_WORD_S = 5.0
_SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
_CLIENT_GONE_STATUS = 499

RowsToJson = Callable[[Sequence[LogprobRow]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Form:
    """How one API writes its answers. `echoes` are the prompts to repeat, by choice; `make_rows` makes what takes the
    log-probabilities of one choice, in order.

    `reading` is set where outputs hold more than content.
    """

    make_events: Callable[[Envelope, int], Events]
    object_name: str
    whole: Callable[[Envelope, Sequence[WholeChoice], Usage], bytes]
    make_rows: Callable[[], RowsToJson] | None = None
    reading: Reading | None = None
    echoes: Sequence[str] = ()


class Writer(Protocol):
    """Takes pieces; `started` tells whether the client has seen a status."""

    started: bool

    async def piece(self, choice: Choice, piece: Piece) -> None: ...

    async def end(self) -> None: ...


class GenerationResponse:
    """Runs a generation while it writes, and stops it when the client goes or time is over."""

    def __init__(
        self,
        generation: Generation,
        make_writer: Callable[[EagerSend], Writer],
        model: str,
        release: Callable[[], None],
    ) -> None:
        self._generation = generation
        self._make_writer = make_writer
        self._model = model
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.current_task()
        assert work is not None
        gone = asyncio.ensure_future(_cancelled_when_gone(work, receive))
        try:
            await self._work(EagerSend(send))
        except asyncio.CancelledError:
            if not gone.done() or work.uncancel():
                raise
        finally:
            gone.cancel()
            self._release()

    async def _work(self, send: EagerSend) -> None:
        writer = self._make_writer(send)
        error: OmniError | None = Cancelled("the client is gone")
        status = _CLIENT_GONE_STATUS
        try:
            error = await self._run(writer)
            status = 200 if error is None else status_of(error)
            if error is not None:
                async with asyncio.timeout(_LAST_WORD_S):
                    await self._send_error(send, error, writer.started)
        except TimeoutError:
            log.info("a client took no error")
        finally:
            send.close()
            self._generation.finished(status, self._model, error)

    async def _run(self, writer: Writer) -> OmniError | None:
        try:
            async with asyncio.timeout_at(self._generation.deadline):
                await self._generation.run(writer.piece)
                await writer.end()
        except TimeoutError:
            return DeadlineExceeded("the request's time is over", reason="deadline")
        except OmniError as error:
            return error
        except Exception as error:
            log.exception("request failed", extra={"request_id": self._generation.request_id})
            return unexpected(error)
        return None

    async def _send_error(self, send: Send, error: OmniError, has_started: bool) -> None:
        if has_started:
            await send({"type": "http.response.body", "body": error_event(error), "more_body": False})
            return
        headers = error_headers(error) | self._generation.headers()
        await send_whole(send, status_of(error), headers, orjson.dumps(error_body(error)))


class StreamWriter:
    """Server-sent events. The status is sent with the first piece, so that earlier failures have their own.

    Where an answer is nothing but text, that of whole step frames goes through outlets.
    """

    def __init__(
        self,
        send: EagerSend,
        generation: Generation,
        envelope: Envelope,
        form: Form,
        continuous: bool,
    ) -> None:
        self.started = False
        self._send = send
        self._generation = generation
        self._envelope = envelope
        self._form = form
        self._continuous = continuous
        self._states = [
            _StreamState(form.make_events(envelope, c.index), None if form.make_rows is None else form.make_rows())
            for c in generation.choices
        ]
        if not (form.reading or form.make_rows or form.echoes or continuous):
            for choice, state in zip(generation.choices, self._states, strict=True):
                choice.outlet = _StreamOutlet(send, state)

    async def piece(self, choice: Choice, piece: Piece) -> None:
        state = self._states[choice.index]
        body = self._full_piece(state, choice, piece)
        if not self.started:
            self.started = True
            headers = _raw(_SSE_HEADERS | self._generation.headers())
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        if body:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        last = DONE
        if self._envelope.has_usage:
            last = usage_event(self._envelope, self._form.object_name, self._generation.usage()) + DONE
        await self._send({"type": "http.response.body", "body": last, "more_body": False})

    def _full_piece(self, state: "_StreamState", choice: Choice, piece: Piece) -> bytes:
        """Everything but plain text: opening, reasoning, log-probabilities, tool calls, usage, closing."""
        parts: list[bytes] = []
        usage = self._generation.usage_of(choice) if self._continuous else None
        if not state.opened:
            state.opened = True
            parts.append(state.events.opening())
            if self._form.echoes:
                parts.append(state.events.text(self._form.echoes[choice.index], None, None))
        found = self._read(state, piece)
        rows = state.rows_to_json(piece.logprobs) if state.rows_to_json and piece.logprobs else None
        if found.reasoning:
            parts.append(state.events.reasoning(found.reasoning, usage))
        if found.content or rows:
            parts.append(state.events.text(found.content, rows, usage))
        if found.calls:
            parts.append(state.events.calls(found.calls, state.num_calls))
            state.num_calls += len(found.calls)
        if piece.finish_reason is not None:
            finish = _finish(piece.finish_reason, has_calls=state.num_calls > 0)
            parts.append(state.events.closing(finish, piece.stop, usage))
        return b"".join(parts)

    def _read(self, state: "_StreamState", piece: Piece) -> Parts:
        if self._form.reading is None:
            return Parts(content=piece.text)
        if state.parser is None:
            state.parser = OutputParser(self._form.reading)
        found = state.parser.push(piece.text)
        if piece.finish_reason is not None:
            rest = state.parser.flush()
            found.reasoning += rest.reasoning
            found.content += rest.content
        return found


class WholeWriter:
    """One JSON object at the end."""

    def __init__(self, send: Send, generation: Generation, envelope: Envelope, form: Form) -> None:
        self.started = False
        self._send = send
        self._generation = generation
        self._envelope = envelope
        self._form = form
        self._pieces: list[list[Piece]] = [[] for _ in generation.choices]
        for choice, pieces in zip(generation.choices, self._pieces, strict=True):
            choice.outlet = _WholeOutlet(pieces)

    async def piece(self, choice: Choice, piece: Piece) -> None:
        self._pieces[choice.index].append(piece)

    async def end(self) -> None:
        choices = [self._whole_choice(index, pieces) for index, pieces in enumerate(self._pieces)]
        body = self._form.whole(self._envelope, choices, self._generation.usage())
        self.started = True
        await send_whole(self._send, 200, self._generation.headers() | {"content-type": "application/json"}, body)

    def _whole_choice(self, index: int, pieces: Sequence[Piece]) -> WholeChoice:
        found = _read_whole("".join(piece.text for piece in pieces), self._form.reading)
        last = pieces[-1]
        text = self._form.echoes[index] + found.content if self._form.echoes else found.content
        rows = [row for piece in pieces for row in piece.logprobs]
        return WholeChoice(
            index=index,
            text=text,
            finish_reason=_finish(last.finish_reason, has_calls=bool(found.calls)),
            stop=last.stop,
            logprobs=self._form.make_rows()(rows) if self._form.make_rows else None,
            tool_calls=found.calls,
            reasoning=found.reasoning or None,
        )


class _WholeOutlet:
    """Always open."""

    __slots__ = ("_pieces", "is_open")

    def __init__(self, pieces: list[Piece]) -> None:
        self._pieces = pieces
        self.is_open = True

    def show(self, text: str) -> None:
        self._pieces.append(Piece(text))


class _StreamOutlet:
    """Open once the choice is, while the client keeps up."""

    __slots__ = ("_send", "_state")

    def __init__(self, send: EagerSend, state: "_StreamState") -> None:
        self._send = send
        self._state = state

    @property
    def is_open(self) -> bool:
        return self._state.opened and self._send.is_clear

    def show(self, text: str) -> None:
        body = self._state.events.text(text, None, None)
        self._send.at_once({"type": "http.response.body", "body": body, "more_body": True})


@dataclass(slots=True)
class _StreamState:
    events: Events
    rows_to_json: RowsToJson | None
    opened: bool = False
    num_calls: int = 0
    parser: OutputParser | None = None


async def send_whole(send: Send, status: int, headers: Mapping[str, str], body: bytes) -> None:
    """A complete answer with its length."""
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": _raw({**headers, "content-length": str(len(body))}),
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _read_whole(text: str, reading: Reading | None) -> Parts:
    if reading is None:
        return Parts(content=text)
    parser = OutputParser(reading)
    found, rest = parser.push(text), parser.flush()
    return Parts(found.reasoning + rest.reasoning, found.content + rest.content, found.calls)


def _finish(reason: FinishReason | None, *, has_calls: bool) -> str:
    if reason is FinishReason.STOP and has_calls:
        return "tool_calls"
    return str(reason or FinishReason.ERROR)


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]


def unexpected(error: Exception) -> OmniError:
    """What a client is told of a fault of ours; the rest is for the log."""
    return Internal(f"the proxy failed: {type(error).__name__}", reason="unexpected")


async def _cancelled_when_gone(work: asyncio.Task[Any], receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    work.cancel()
