"""How many sequences may be in flight, and whether new ones are taken at all."""

import asyncio
from collections.abc import Callable

from omni_common.errors import ResourceExhausted, Unavailable
from omni_proxy.metrics import Metrics

_RETRY_AFTER_S = 1.0


class Admission:
    def __init__(self, max_inflight: int, metrics: Metrics) -> None:
        self._max_inflight = max_inflight
        self._metrics = metrics
        self._inflight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_draining = False

    def enter(self, sequences: int) -> Callable[[], None]:
        """Count sequences in; call what is returned once, when they have ended.

        Raises:
            ResourceExhausted: they would be too many together.
            Unavailable: the proxy is draining.
        """
        if self.is_draining:
            raise Unavailable("the proxy is shutting down", reason="draining", retry_after_s=_RETRY_AFTER_S)
        if self._inflight + sequences > self._max_inflight:
            message = f"{self._inflight} sequences are in flight, at most {self._max_inflight} are allowed"
            raise ResourceExhausted(message, reason="too_many_in_flight", retry_after_s=_RETRY_AFTER_S)
        self._add(sequences)
        return lambda: self._add(-sequences)

    async def drained(self) -> None:
        """Until nothing is in flight."""
        await self._idle.wait()

    def _add(self, sequences: int) -> None:
        self._inflight += sequences
        self._metrics.running.set(self._inflight)
        if self._inflight:
            self._idle.clear()
        else:
            self._idle.set()
