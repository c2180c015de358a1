"""Where the time of sequences went, and what tenants used: metrics written once, when a request ends."""

from collections.abc import Mapping
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Histogram

_SECONDS = (1e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
MAX_TENANTS = 100
OTHER_TENANTS = "other"
NO_TENANT = "none"


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
            return Counter(f"omni_proxy_tenant_{name}", text, ["tenant"], registry=registry)

        self._max_tenants = max_tenants
        self._known = {NO_TENANT}
        self._requests = counter("requests", "Requests that reached the scheduler")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens")
        self._cached_tokens = counter("cached_tokens", "Of those, found cached")
        self._output_tokens = counter("output_tokens", "Generated tokens")

    def used(self, tenant: str, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> None:
        """One request's usage."""
        label = self._label(tenant)
        self._requests.labels(label).inc()
        self._prompt_tokens.labels(label).inc(prompt_tokens)
        self._cached_tokens.labels(label).inc(cached_tokens)
        self._output_tokens.labels(label).inc(output_tokens)

    def _label(self, tenant: str) -> str:
        name = tenant or NO_TENANT
        if name not in self._known:
            if len(self._known) > self._max_tenants:
                return OTHER_TENANTS
            self._known.add(name)
        return name
