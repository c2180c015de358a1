"""Work that is not left half done when whoever asked for it goes away."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Unbroken:
    """Owner of such work."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result; a caller that is cancelled does not cancel it."""
        return await asyncio.shield(self.start(work))

    async def settle(self) -> None:
        """Wait for what is under way."""
        while self._running:
            await asyncio.wait(self._running)
