"""Where the time of sequences went, and what tenants used: metrics written once, when a request ends."""

from collections.abc import Mapping
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Histogram

_SECONDS = (1e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
MAX_TENANTS = 100
OTHER_TENANTS = "other"
NO_TENANT = "none"
_SHARED_LABELS = 2


class Phase(StrEnum):
    """Parts of a sequence's life; they follow each other, but FIRST_TOKEN is from arrival and holds those before it."""

    HOLD = "hold"
    """In the proxy's queue."""
    SCHEDULE = "schedule"
    """Choosing workers."""
    QUEUE = "queue"
    """At workers, as they say."""
    PREFILL = "prefill"
    """Computing the prompt, as the worker says."""
    TRANSFER = "transfer"
    """Moving its blocks to decode, as decode says."""
    FIRST_TOKEN = "first_token"
    DECODE = "decode"
    """From the first token to the last."""


class PhaseMetrics:
    """Names start with `omni_proxy_`. Exemplars carry the trace id; only OpenMetrics shows them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        seconds = Histogram(
            "omni_proxy_phase_seconds", "Phases of sequences", ["phase"], buckets=_SECONDS, registry=registry
        )
        self._seconds = {phase: seconds.labels(phase) for phase in Phase}

    def observe(self, seconds: Mapping[Phase, float], exemplar: dict[str, str] | None) -> None:
        for phase, value in seconds.items():
            self._seconds[phase].observe(max(0.0, value), exemplar)


class TenantMetrics:
    """What tenants used. The first `max_tenants` have labels of their own, later ones share one."""

    def __init__(self, registry: CollectorRegistry, max_tenants: int = MAX_TENANTS) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["tenant"], registry=registry)

        self._max_tenants = max_tenants
        self._counters = (
            counter("omni_proxy_tenant_requests", "Requests that reached the scheduler"),
            counter("omni_proxy_tenant_prompt_tokens", "Prompt tokens"),
            counter("omni_proxy_tenant_cached_tokens", "Of those, found cached"),
            counter("omni_proxy_tenant_output_tokens", "Generated tokens"),
        )
        self._known: dict[str, tuple[Counter, ...]] = {}
        for label in (NO_TENANT, OTHER_TENANTS):
            self._learn(label)

    def used(self, tenant: str, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> None:
        """One request's usage."""
        label = tenant or NO_TENANT
        counters = self._known.get(label)
        if counters is None:
            has_room = len(self._known) < self._max_tenants + _SHARED_LABELS
            counters = self._learn(label) if has_room else self._known[OTHER_TENANTS]
        for counter, amount in zip(counters, (1, prompt_tokens, cached_tokens, output_tokens), strict=True):
            counter.inc(amount)

    def _learn(self, label: str) -> tuple[Counter, ...]:
        found = self._known[label] = tuple(counter.labels(label) for counter in self._counters)
        return found
