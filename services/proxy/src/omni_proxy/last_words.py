"""Answers that the end of the process cuts off: they end in an error, which a broken connection would not tell."""

import asyncio
from collections.abc import Awaitable

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omni_common.errors import Unavailable
from omni_proxy.answering import send_whole
from omni_proxy.openai_errors import error_body, error_event, error_headers, status_of

_LAST_WORD_S = 1.0
_SHUTTING_DOWN = Unavailable("the proxy is shutting down", reason="draining", retry_after_s=1.0)


class LastWords:
    """The application, and the requests that run in it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._running: set[asyncio.Task[None]] = set()
        self._is_over = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        answer = _Answer(send)
        try:
            await self._app(scope, receive, answer)
        except asyncio.CancelledError:
            if not self._is_over:
                raise
            await answer.break_off()
        finally:
            self._running.discard(task)

    async def cut_off(self) -> None:
        """Ends what still runs."""
        self._is_over = True
        running = list(self._running)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=2 * _LAST_WORD_S)


class _Answer:
    """ASGI's `send`, aware of how far the answer is."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._has_started = self._is_stream = self._has_ended = False

    def __call__(self, message: Message) -> Awaitable[None]:
        """No coroutine of its own: it is called for each token."""
        if message["type"] == "http.response.start":
            self._has_started = True
            self._is_stream = any(value.startswith(b"text/event-stream") for _, value in message.get("headers", ()))
        elif not message.get("more_body", False):
            self._has_ended = True
        return self._send(message)

    async def break_off(self) -> None:
        """A client that takes nothing is left without."""
        try:
            async with asyncio.timeout(_LAST_WORD_S):
                await self._last_word()
        except TimeoutError:
            return

    async def _last_word(self) -> None:
        if self._has_ended:
            return
        if not self._has_started:
            body = orjson.dumps(error_body(_SHUTTING_DOWN))
            await send_whole(self._send, status_of(_SHUTTING_DOWN), error_headers(_SHUTTING_DOWN), body)
        elif self._is_stream:
            await self._send({"type": "http.response.body", "body": error_event(_SHUTTING_DOWN)})
