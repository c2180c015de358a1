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
    loop, waited_s = asyncio.get_running_loop(), settings.patience_s(predicted_s)
    handle: asyncio.TimerHandle | None = None

    def look() -> None:
        nonlocal handle, waited_s
        if settings.is_stuck(waited_s, predicted_s, settings.silence_s if is_silent() else 0.0):
            guard.reschedule(loop.time())
            return
        waited_s += _LOOK_AGAIN_S
        handle = loop.call_later(_LOOK_AGAIN_S, look)

    handle = loop.call_later(waited_s, look)
    try:
        async with asyncio.timeout(None) as guard:
            yield
    except TimeoutError:
        raise Unavailable("the worker has gone quiet", reason=STALLED) from None
    finally:
        if handle is not None:
            handle.cancel()
