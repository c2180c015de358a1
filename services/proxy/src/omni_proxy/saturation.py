"""How full each role is, for autoscalers and people: 1 means that one more request would have to wait too long.

    prefill  predicted backlog of the mean worker / what a first token may take
    decode   the largest of: seats taken, KV blocks taken, predicted step / inter-token SLO; of the mean worker
    proxy    share of a core that this proxy's event loop takes, which has one

What waits in the proxy counts as prefill's backlog. Where it waits for a seat at decode, or for its steps to be short
enough, it does not, and decode is at 1 or more. Workers of both roles count in both.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Gauge

from omni_proxy.fleet import Fleet
from omni_proxy.pulse import Pulse
from omni_proxy.scheduling.request import Slo
from omni_proxy.scheduling.view import Floats, Rows

_TTFT_MS = 2000.0
"""What a first token may take where no SLO says it."""


@dataclass(frozen=True, slots=True)
class RoleLoad:
    """Means over the role's workers that take work, or of this proxy; shares may exceed 1."""

    role: str
    workers: int
    saturation: float
    backlog_ms: float
    """Predicted, per worker; of prefill with what waits in the proxy. Of the proxy, how late what is due runs."""
    seats: float
    kv_usage: float
    step_ms: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits in the proxy: its prefill's predicted milliseconds, and whether it waits for decode instead."""

    prefill_ms: float = 0.0
    is_for_decode: bool = False


class Saturation:
    def __init__(self, fleet: Fleet, slo: Callable[[], Slo], waiting: Callable[[], Waiting], pulse: Pulse) -> None:
        self._fleet = fleet
        self._slo = slo
        self._waiting = waiting
        self._pulse = pulse

    def roles(self) -> list[RoleLoad]:
        """Prefill, decode, proxy."""
        slots, prefills, decodes = self._fleet.usable_slots()
        slo, waiting = self._slo(), self._waiting()
        computing = slots[prefills] if prefills.any() else slots[decodes]
        backlog_ms = 0.0
        if len(computing):
            waiting_ms = 0.0 if waiting.is_for_decode else waiting.prefill_ms
            backlog_ms = float(self._backlog_ms(computing).mean()) + waiting_ms / len(computing)
        full = backlog_ms / _allowed_ms(slo)
        prefill = RoleLoad("prefill", int(prefills.sum()), full, backlog_ms, 0.0, 0.0, 0.0)
        proxy = RoleLoad("proxy", 1, self._pulse.busy, self._pulse.lag_ms, 0.0, 0.0, 0.0)
        return [prefill, self._decode(slots[decodes], slo, waiting), proxy]

    def workers(self) -> Mapping[str, float]:
        """Of each worker that takes work, by id; of both roles the fuller one. What waits in the proxy is left out."""
        slots, prefills, decodes = self._fleet.usable_slots()
        slo, seats = self._slo(), self._seats(slots)
        computing = np.where(prefills, self._backlog_ms(slots) / _allowed_ms(slo), 0.0)
        running = np.maximum(seats, self._fleet.columns.kv_usage[slots])
        if slo.itl_ms:
            running = np.maximum(running, self._step_ms(slots) / slo.itl_ms)
        full = np.maximum(computing, np.where(decodes, running, 0.0))
        return dict(zip(self._fleet.usable_ids(), full.tolist(), strict=True))

    def to_json(self) -> dict[str, Any]:
        return {"roles": [asdict(role) for role in self.roles()]}

    def _decode(self, slots: Rows, slo: Slo, waiting: Waiting) -> RoleLoad:
        if not len(slots):
            return RoleLoad("decode", 0, 0.0, 0.0, 0.0, 0.0, 0.0)
        step_ms, seats = float(self._step_ms(slots).mean()), float(self._seats(slots).mean())
        kv_usage = float(self._fleet.columns.kv_usage[slots].mean())
        full = max(seats, kv_usage, step_ms / slo.itl_ms if slo.itl_ms else 0.0, float(waiting.is_for_decode))
        return RoleLoad("decode", len(slots), full, 0.0, seats, kv_usage, step_ms)

    def _backlog_ms(self, slots: Rows) -> Floats:
        return self._fleet.times.backlog_ms(slots, self._fleet.now())

    def _step_ms(self, slots: Rows) -> Floats:
        """With one sequence more that has no context yet."""
        nothing = np.zeros(len(slots), np.int64)
        return self._fleet.times.of(slots, self._fleet.now(), 0, 1, nothing).step_ms

    def _seats(self, slots: Rows) -> Floats:
        """Share taken, those who wait for one included."""
        most, sequences = self._fleet.times.most_sequences(slots), self._fleet.times.sequences(slots)
        taken: Floats = np.where(most > 0, sequences / np.maximum(most, 1), 0.0)
        return taken


def _allowed_ms(slo: Slo) -> float:
    return slo.ttft_ms or _TTFT_MS


class SaturationMetrics:
    """`omni_proxy_saturation` and `omni_proxy_backlog_seconds`."""

    def __init__(self, saturation: Saturation, registry: CollectorRegistry) -> None:
        self._saturation = saturation
        self._full = Gauge(
            "omni_proxy_saturation", "1: one more request would wait too long", ["role"], registry=registry
        )
        self._backlog = Gauge(
            "omni_proxy_backlog_seconds",
            "Predicted, per worker; of the proxy, its event loop's lag",
            ["role"],
            registry=registry,
        )

    def observe(self) -> None:
        """Set them."""
        for role in self._saturation.roles():
            self._full.labels(role.role).set(role.saturation)
            self._backlog.labels(role.role).set(role.backlog_ms / 1e3)
