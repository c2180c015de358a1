"""The product's flow gate on the simulation's clock: its futures and timers without an event loop."""

import asyncio
from asyncio import events
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry
from tracereplay.clock import Clock

from omni_proxy.fleet import Fleet
from omni_proxy.flow.gate import FlowGate
from omni_proxy.flow.metrics import FlowMetrics
from omni_proxy.flow.queue import FlowQueue
from omni_proxy.flow.settings import FlowSettings
from omni_proxy.flow.ticket import Ticket
from omni_proxy.room import FleetRoom

_RESOLUTION_S = 1e-5
"""Of timers: the simulation's time does not pass by itself."""


class _Handle:
    """A call that may be cancelled before it is made."""

    def __init__(self, call: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._call: Callable[..., object] | None = call
        self._args = args

    def cancel(self) -> None:
        self._call = None

    def run(self) -> None:
        if self._call is not None:
            self._call(*self._args)


class _Loop:
    """As much of an event loop as futures and the gate ask for."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def time(self) -> float:
        return self._clock.now_s

    def get_debug(self) -> bool:
        return False

    def create_future(self) -> "asyncio.Future[Any]":
        return asyncio.Future(loop=self)  # type: ignore[arg-type]

    def call_at(self, when: float, call: Callable[..., object], *args: Any, context: object = None) -> _Handle:
        handle = _Handle(call, args)
        self._clock.at(max(when, self._clock.now_s + _RESOLUTION_S), handle.run)
        return handle

    def call_soon(self, call: Callable[..., object], *args: Any, context: object = None) -> _Handle:
        handle = _Handle(call, args)
        self._clock.after(0.0, handle.run)
        return handle


@contextmanager
def _running(loop: _Loop) -> Iterator[None]:
    events._set_running_loop(loop)  # type: ignore[arg-type]
    try:
        yield
    finally:
        events._set_running_loop(None)


class Gate:
    """Turns of the real gate, as callbacks."""

    def __init__(self, clock: Clock, fleet: Fleet, settings: FlowSettings) -> None:
        self._loop = _Loop(clock)
        room, metrics = FleetRoom(fleet, settings.lookahead_ms), FlowMetrics(CollectorRegistry())
        self._gate = FlowGate(FlowQueue(settings), room, metrics, self._loop)  # type: ignore[arg-type]

    def enter(self, ticket: Ticket, then: Callable[[], None]) -> None:
        """`then` is called at the ticket's turn, which may be at once."""
        self._step(self._gate.turn(ticket), then)

    def poke(self) -> None:
        self._gate.poke()

    def _step(self, turn: Coroutine[Any, Any, object], then: Callable[[], None]) -> None:
        try:
            with _running(self._loop):
                waiting = turn.send(None)
        except StopIteration:
            then()
            return
        # Whoever awaits a future in earnest is told so by its flag; the coroutine is ours to go on with.
        waiting._asyncio_future_blocking = False
        waiting.add_done_callback(lambda _: self._step(turn, then))
