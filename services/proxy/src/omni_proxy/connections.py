"""What a client may cost while its request is not there: time, bytes of a head, requests sent ahead.

uvicorn bounds none of them. It also loses the body of a request that offers an upgrade, as Java's client does to each
server it meets (`Upgrade: h2c`): the parser stops behind the head. An offer need not be taken, so it is read without.
"""

import asyncio
import logging
from typing import Any

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from omni_common.errors import InvalidRequest
from omni_proxy.openai_errors import error_body

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 * 1024
"""Of a head, and of what may stand between and behind the parts of a body. As much again may come with one read."""
MAX_AHEAD = 64
"""Requests of one connection that wait for the answers before them."""
_LINGER_S = 1.0
"""How long a refused client that still sends is read on; else it would see a reset in place of the answer."""


class _TooMuch(Exception):
    """Raised in the parser's callbacks: the connection is refused."""


class Connection(HttpToolsProtocol):
    """`patience_s` is the time for a head, the first one from the connection's beginning, and for what is still to come
    of a body after its answer."""

    def __init__(self, *, patience_s: float, **of_uvicorn: Any) -> None:
        super().__init__(**of_uvicorn)
        self._patience_s = patience_s
        self._deadline: asyncio.TimerHandle | None = None
        self._unused_bytes = 0
        self._is_message_open = False
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_client()

    def connection_lost(self, exc: Exception | None) -> None:
        self._hear_client()
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._unset_keepalive_if_required()
        self._unused_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offered:
            if self.parser.get_method() != b"CONNECT":
                self.data_received(self._head_without_offer() + data[offered.args[0] :])
            return
        except httptools.HttpParserError as error:
            is_broken = not isinstance(error.__context__, _TooMuch)
            self._refuse("400 Bad Request", "this is not HTTP" if is_broken else "too many requests ahead of answers")
            return
        if self._unused_bytes > MAX_HEAD_BYTES:
            limit = f"a request's head has at most {MAX_HEAD_BYTES} bytes"
            self._refuse("431 Request Header Fields Too Large", limit)
        elif self._deadline is None and not self._is_answering:
            self._await_client()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_message_open = True

    def on_headers_complete(self) -> None:
        self._hear_client()
        self._unused_bytes = 0
        if len(self.pipeline) >= MAX_AHEAD:
            raise _TooMuch
        if not self._offers_upgrade():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unused_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._hear_client()
        self._unused_bytes = 0
        self._is_message_open = False
        if not self._offers_upgrade():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_message_open and self._deadline is None:
            self._await_client()

    def _offers_upgrade(self) -> bool:
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _head_without_offer(self) -> bytes:
        first = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        rest = [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join((first, *rest, b"", b""))

    def _await_client(self) -> None:
        self._deadline = self.loop.call_later(self._patience_s, self.transport.close)

    def _hear_client(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: str, message: str) -> None:
        """Said only where it cannot run into an answer that has begun."""
        log.info("connection refused", extra={"reason": message})
        self._is_refused = True
        if self._is_answering:
            self.transport.close()
            return
        body = orjson.dumps(error_body(InvalidRequest(message, reason="bad_http")))
        head = (
            f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close"
        )
        self.transport.write(head.encode() + b"\r\n\r\n" + body)
        self._hear_client()
        self._deadline = self.loop.call_later(_LINGER_S, self.transport.close)
