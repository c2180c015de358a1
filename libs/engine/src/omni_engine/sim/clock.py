"""Time as the simulated engine sees it."""

import asyncio
import heapq
import itertools
import time
from typing import Protocol

_TURNS_PER_JUMP = 20


class Clock(Protocol):
    """Seconds since some fixed moment, and waiting in them."""

    def now_s(self) -> float: ...

    async def sleep(self, seconds: float) -> None: ...


class WallClock:
    """Real time."""

    def now_s(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class VirtualClock:
    """Time that jumps to the next sleeper's moment once the event loop has had its turns. Drive it with `run`."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    def now_s(self) -> float:
        return self._now_s

    async def sleep(self, seconds: float) -> None:
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now_s + max(0.0, seconds), next(self._numbers), woken))
        await woken

    async def run(self) -> None:
        """Jump from sleeper to sleeper until cancelled."""
        while True:
            for _ in range(_TURNS_PER_JUMP):
                await asyncio.sleep(0)
            while self._sleepers and self._sleepers[0][2].done():
                heapq.heappop(self._sleepers)
            if self._sleepers:
                self._now_s, _, woken = heapq.heappop(self._sleepers)
                woken.set_result(None)
