"""ASGI's `send` for callers that cannot wait."""

import asyncio
import types
from collections.abc import Generator, MutableMapping
from typing import Any

from starlette.types import Send

Message = MutableMapping[str, Any]


class EagerSend:
    """Wraps `send`; messages keep the order of the calls, whichever way they go."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._rest: asyncio.Future[None] | None = None

    @property
    def is_clear(self) -> bool:
        """No message waits for a slow client."""
        return self._rest is None

    def at_once(self, message: Message) -> None:
        """A part of the body, only while `is_clear`.

        One that has to wait goes on in a task; until it is through nothing is clear.
        """
        sending = self._send(message).__await__()
        try:
            waits_for = next(sending)
        except StopIteration:
            return
        self._rest = asyncio.ensure_future(_resumed(sending, waits_for))
        self._rest.add_done_callback(self._cleared)

    async def __call__(self, message: Message) -> None:
        if self._rest is not None:
            await self._rest
        await self._send(message)

    def close(self) -> None:
        """Give up a message that still waits."""
        if self._rest is not None:
            self._rest.cancel()

    def _cleared(self, rest: "asyncio.Future[None]") -> None:
        """A failed message stays, for the next call to raise."""
        if rest.cancelled() or rest.exception() is None:
            self._rest = None


async def _resumed(sending: Generator[Any, None, None], waits_for: Any) -> None:
    """The rest of an awaitable that was run up to where it waits for a future."""

    @types.coroutine
    def rest() -> Generator[Any, None, None]:
        yield waits_for
        yield from sending

    await rest()
