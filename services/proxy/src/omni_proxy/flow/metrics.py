"""Prometheus metrics of the queue and its gate: `omni_proxy_flow_*`."""

from collections.abc import Callable
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from omni_proxy.readings import Readings

_HOLD = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


DROPPED = (
    "queue_full", "held_back", "band_full", "tenant_queue_full", "queue_ttl", "slo_out_of_reach", "displaced",
    "no_decode_worker", "no_adapter", "filtered_out", "rejected", "deadline", "cancelled", "requests_per_minute",
    "tokens_per_minute", "tokens_per_day", "tenant_in_flight",
)  # fmt: skip
"""Why requests come to no worker; `rejected`: all workers were full. Plug-ins may have reasons of their own."""


class Release(StrEnum):
    """Why a request was let go to the workers."""

    ROOM = "room"
    """A worker had room."""
    BOUNDARY = "boundary"
    """At the instant at which a worker was predicted to have room."""
    MAX_HOLD = "max_hold"
    """Nothing could be released for as long as a head may be held."""
    SLO = "slo"
    """Its service level allowed no longer wait."""
    NO_PREDICTION = "no_prediction"


class FlowMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._readings = Readings(registry)
        self._waiting = Gauge("omni_proxy_flow_waiting", "Requests held back", ["band"], registry=registry)
        self._bytes = Gauge("omni_proxy_flow_bytes", "Of requests held back", registry=registry)
        self._tenants = Gauge("omni_proxy_flow_tenants", "With requests held back", ["band"], registry=registry)
        self._saturation = Gauge(
            "omni_proxy_flow_saturation", "Predicted work of the least loaded worker / look-ahead", registry=registry
        )
        self.hold = Histogram(
            "omni_proxy_flow_hold_seconds", "From arrival at the queue to release", buckets=_HOLD, registry=registry
        )
        self._releases = Counter("omni_proxy_flow_releases", "Requests let go", ["reason"], registry=registry)
        self.releases = {reason: self._releases.labels(reason) for reason in Release}
        self.refusals = Counter(
            "omni_proxy_tenant_refusals", "Above a rate or quota", ["tenant", "reason"], registry=registry
        )
        self.dropped = Counter("omni_proxy_dropped", "Requests that came to no worker", ["reason"], registry=registry)
        for reason in DROPPED:
            self.dropped.labels(reason)

    def watch(
        self,
        saturation: Callable[[], float],
        size_bytes: Callable[[], float],
        bands: dict[str, tuple[Callable[[], float], Callable[[], float]]],
    ) -> None:
        """Read all when asked for; `bands` gives requests and tenants by the name of a band."""
        self._waiting.clear()
        self._tenants.clear()

        def read() -> None:
            self._saturation.set(saturation())
            self._bytes.set(size_bytes())
            for name, (requests, tenants) in bands.items():
                self._waiting.labels(name).set(requests())
                self._tenants.labels(name).set(tenants())

        self._readings.use(read)
