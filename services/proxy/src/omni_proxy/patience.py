"""Waiting for a worker until it counts as stuck."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from omni_common.errors import Unavailable
from omni_proxy.attempt import STALLED
from omni_proxy.health import HealthSettings

_LOOK_AGAIN_S = 0.5


@asynccontextmanager
async def patience(settings: HealthSettings, predicted_s: float, is_silent: Callable[[], bool]) -> AsyncIterator[None]:
    """Raises `Unavailable` (`STALLED`) instead of waiting on for a worker that is late; see `HealthSettings.is_stuck`.

    Time is counted, not read from the clock: while this process was stopped nobody was waited for.
    """
    try:
        async with asyncio.timeout(None) as guard:
            watch = _Watch(settings, predicted_s, is_silent, guard)
            try:
                yield
            finally:
                watch.timer.cancel()
    except TimeoutError:
        raise Unavailable("the worker has gone quiet", reason=STALLED) from None


class _Watch:
    """Ends `guard` when the worker is stuck."""

    def __init__(
        self, settings: HealthSettings, predicted_s: float, is_silent: Callable[[], bool], guard: asyncio.Timeout
    ) -> None:
        self._settings = settings
        self._predicted_s = predicted_s
        self._is_silent = is_silent
        self._guard = guard
        self._loop = asyncio.get_running_loop()
        self._waited_s = settings.patience_s(predicted_s)
        self.timer = self._loop.call_later(self._waited_s, self._look)

    def _look(self) -> None:
        silent_s = self._settings.silence_s if self._is_silent() else 0.0
        if self._settings.is_stuck(self._waited_s, self._predicted_s, silent_s):
            self._guard.reschedule(self._loop.time())
            return
        self._waited_s += _LOOK_AGAIN_S
        self.timer = self._loop.call_later(_LOOK_AGAIN_S, self._look)
