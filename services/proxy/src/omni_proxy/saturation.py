"""How full each role is, for autoscalers and people: 1 means that one more request would have to wait too long.

    prefill  predicted backlog of the mean worker / what a first token may take
    decode   the largest of: seats taken, KV blocks taken, predicted step / inter-token SLO; of the mean worker

What waits in the proxy counts as prefill's backlog, even where decode's steps are the bound that holds it: then decode
is at 0.95 or more. Workers of both roles count in both.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Gauge

from omni_proxy.fleet import Fleet
from omni_proxy.scheduling.request import Slo
from omni_proxy.scheduling.view import Floats, Rows

_TTFT_MS = 2000.0
"""What a first token may take where no SLO says it."""


@dataclass(frozen=True, slots=True)
class RoleLoad:
    """Means over the role's workers that take work; shares may exceed 1."""

    role: str
    workers: int
    saturation: float
    backlog_ms: float
    """Predicted, per worker; of prefill with what waits in the proxy."""
    seats: float
    kv_usage: float
    step_ms: float


class Saturation:
    """`waiting_ms`: predicted milliseconds of computing that wait in the proxy for prefill."""

    def __init__(self, fleet: Fleet, slo: Callable[[], Slo], waiting_ms: Callable[[], float]) -> None:
        self._fleet = fleet
        self._slo = slo
        self._waiting_ms = waiting_ms

    def roles(self) -> list[RoleLoad]:
        """Prefill, then decode."""
        slots, prefills, decodes = self._fleet.usable_slots()
        slo = self._slo()
        computing = slots[prefills] if prefills.any() else slots[decodes]
        backlog_ms = 0.0
        if len(computing):
            backlog_ms = float(self._backlog_ms(computing).mean()) + self._waiting_ms() / len(computing)
        full = backlog_ms / _allowed_ms(slo)
        prefill = RoleLoad("prefill", int(prefills.sum()), full, backlog_ms, 0.0, 0.0, 0.0)
        return [prefill, self._decode(slots[decodes], slo)]

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

    def _decode(self, slots: Rows, slo: Slo) -> RoleLoad:
        if not len(slots):
            return RoleLoad("decode", 0, 0.0, 0.0, 0.0, 0.0, 0.0)
        step_ms, seats = float(self._step_ms(slots).mean()), float(self._seats(slots).mean())
        kv_usage = float(self._fleet.columns.kv_usage[slots].mean())
        full = max(seats, kv_usage, step_ms / slo.itl_ms if slo.itl_ms else 0.0)
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
        self._backlog = Gauge("omni_proxy_backlog_seconds", "Predicted, per worker", ["role"], registry=registry)

    def observe(self) -> None:
        """Set them."""
        for role in self._saturation.roles():
            self._full.labels(role.role).set(role.saturation)
            self._backlog.labels(role.role).set(role.backlog_ms / 1e3)
