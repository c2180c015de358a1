"""A worker's block events on their way to those who listen."""

import random
from collections.abc import Callable, Sequence

from omni_engine.ports import BlockEvent
from tracereplay.clock import Clock


class Reports:
    """Collected, published each `publish_s` at a phase of the worker's own, and delivered in order `network_s` later,
    half to one and a half of it."""

    def __init__(
        self,
        clock: Clock,
        publish_s: float,
        network_s: float,
        rng: random.Random,
        deliver: Callable[[Sequence[BlockEvent]], None],
    ) -> None:
        self._clock, self._publish_s, self._network_s, self._rng = clock, publish_s, network_s, rng
        self._deliver = deliver
        self._phase_s = rng.uniform(0, publish_s)
        self._pending: list[BlockEvent] = []
        self._arrived_s = 0.0

    def add(self, events: Sequence[BlockEvent]) -> None:
        if not self._pending:
            self._clock.at(self._clock.next_tick(self._phase_s, self._publish_s), self._publish)
        self._pending.extend(events)

    def _publish(self) -> None:
        batch, self._pending = self._pending, []
        arrival_s = self._clock.now_s + self._network_s * self._rng.uniform(0.5, 1.5)
        self._arrived_s = max(self._arrived_s, arrival_s)
        self._clock.at(self._arrived_s, self._deliver, batch)
