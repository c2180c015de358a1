"""Gauges that are set when somebody asks for metrics."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

_LONGEST_S = 2.0
log = logging.getLogger(__name__)


class Readings(Collector):
    """Has gauges set before they are collected: those that are registered after it.

    It reads on the event loop even for the thread that serves METRICS_PORT. What is read belongs to the loop, and may
    be made anew by being read.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reads: tuple[Callable[[], object], ...] = ()
        registry.register(self)

    def use(self, *reads: Callable[[], object]) -> None:
        """Call these instead of those before each time somebody asks, on the loop that runs here, if one does."""
        self._loop, self._reads = _loop_here(), reads

    def collect(self) -> Iterable[Metric]:
        loop = self._loop
        if loop is None or loop is _loop_here():
            self._read()
            return ()
        if loop.is_closed():
            return ()
        done: Future[None] = Future()
        loop.call_soon_threadsafe(self._read_for, done)
        try:
            done.result(_LONGEST_S)
        except TimeoutError:
            # The loop is held up, or has just ended: what was set last is told.
            done.cancel()
        return ()

    def _read(self) -> None:
        for read in self._reads:
            try:
                read()
            except Exception as error:  # a plug-in may raise anything: what was set last is told, and all the rest
                log.warning("a metric could not be read", extra={"error": type(error).__name__})

    def _read_for(self, done: "Future[None]") -> None:
        if not done.set_running_or_notify_cancel():
            return
        self._read()
        done.set_result(None)


def _loop_here() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
