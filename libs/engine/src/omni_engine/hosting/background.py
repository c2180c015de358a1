"""Short tasks that outlive the call that started them, with one owner."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger(__name__)


class Background:
    """Owns fire-and-forget work such as aborts; each piece has a deadline."""

    def __init__(self, timeout_s: float = 10.0) -> None:
        self._timeout_s = timeout_s
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        task = asyncio.create_task(self._bounded(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _bounded(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await work
        except Exception as error:
            log.warning("background work failed", extra={"work": name, "error": type(error).__name__})

    async def close(self) -> None:
        """Wait for what runs; every piece ends within its deadline."""
        while self._tasks:
            await asyncio.wait(self._tasks)
