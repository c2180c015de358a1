"""Holds requests at the proxy until a worker is about to be free: the product's queue on the simulation's clock."""

import math
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from fleetsim.clock import Clock
from omni_proxy.flow.queue import FlowQueue
from omni_proxy.flow.settings import FlowSettings
from omni_proxy.flow.ticket import Ticket

_CLIENT_PATIENCE_S = 3600.0
_LEAST_WAIT_S = 0.0002


class Waiting(Protocol):
    """A request as the gate sees it."""

    @property
    def number(self) -> int: ...

    @property
    def arrived_s(self) -> float: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def ttft_slo_ms(self) -> float | None: ...


W = TypeVar("W", bound=Waiting)


class Gate(Generic[W]):
    """`room_in_ms()`: predicted time until a worker would begin with another prompt; `release(waiting)` sends one."""

    def __init__(
        self,
        clock: Clock,
        settings: FlowSettings,
        room_in_ms: Callable[[], float],
        prefill_of: Callable[[W], tuple[int, float]],
        release: Callable[[W], None],
    ) -> None:
        """`prefill_of`: uncached tokens and milliseconds where they are least."""
        self._clock, self._settings = clock, settings
        self._room_in_ms, self._prefill_of, self._release = room_in_ms, prefill_of, release
        self._queue = FlowQueue(settings)
        self._waiting: dict[Ticket, W] = {}
        self._released_s = 0.0
        self._timer = 0

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, waiting: W) -> None:
        uncached, prefill_ms = self._prefill_of(waiting)
        ticket = Ticket(
            request_id=str(waiting.number),
            arrived_s=waiting.arrived_s,
            deadline_s=waiting.arrived_s + _CLIENT_PATIENCE_S,
            prompt_tokens=waiting.prompt_tokens,
            uncached_tokens=uncached,
            ttft_slo_ms=waiting.ttft_slo_ms,
            prefill_ms=prefill_ms,
        )
        if not self._queue:
            self._released_s = self._clock.now_s
        self._waiting[ticket] = waiting
        self._queue.offer(ticket, self._clock.now_s)
        self.poke()

    def poke(self) -> None:
        """Release while a worker has room, or the head was held for as long as it may be."""
        while self._queue:
            now_s = self._clock.now_s
            room_in_s = self._room_in_ms() / 1e3
            held_until_s = self._released_s + self._settings.max_hold_ms / 1e3
            if room_in_s > 0 and now_s < held_until_s:
                self._timer += 1
                wake_s = min(now_s + max(room_in_s, _LEAST_WAIT_S), held_until_s)
                if wake_s < math.inf:
                    self._clock.at(wake_s, self._timed, self._timer)
                return
            ticket = self._queue.pop(now_s)
            if ticket is None:
                return
            self._released_s = now_s
            self._release(self._waiting.pop(ticket))

    def _timed(self, timer: int) -> None:
        if timer == self._timer:
            self.poke()
