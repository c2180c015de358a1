"""Prometheus metrics of the proxy."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from omni_proxy.health import Cause
from omni_proxy.phases import PhaseMetrics, TenantMetrics
from omni_proxy.readings import Readings
from omni_proxy.scheduling.decision import Decision
from omni_proxy.scheduling.times import Seen

_LATENCY = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_LOOKUP = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
_DEPTH = (0, 64, 256, 1024, 4096, 16_384, 65_536, 131_072, 262_144)
_ERROR = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10)
_GAP = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)

M = TypeVar("M", Counter, Histogram)


class Labelled(Generic[M]):
    """A metric's children, each looked up once: `labels` itself takes a lock and costs more than counting."""

    def __init__(self, metric: M) -> None:
        self.labels: Callable[..., M] = cache(metric.labels)


def from_zero(counter: Counter, values: Iterable[str]) -> Counter:
    """With a series for each of its label's values: `rate` does not see the event that begins a series."""
    for value in values:
        counter.labels(value)
    return counter


class Metrics:
    """Names start with `omni_proxy_`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.readings = Readings(registry)
        self.requests = Labelled(Counter("omni_proxy_requests", "Requests by HTTP status", ["code"], registry=registry))
        self.adapter_requests = Counter(
            "omni_proxy_adapter_requests", "Requests that named a LoRA adapter", ["adapter"], registry=registry
        )
        self.running = Gauge("omni_proxy_running_sequences", "Sequences in flight", registry=registry)
        self.ttft = Histogram("omni_proxy_ttft_seconds", "To the first token", buckets=_LATENCY, registry=registry)
        self.e2e = Histogram("omni_proxy_e2e_seconds", "Whole requests", buckets=_LATENCY, registry=registry)
        self.frame_gap = Histogram(
            "omni_proxy_itl_seconds", "Gap between step frames of a busy session", buckets=_GAP, registry=registry
        )
        self.prompt_tokens = Counter("omni_proxy_prompt_tokens", "Prompt tokens", registry=registry)
        self.cached_tokens = Counter("omni_proxy_cached_tokens", "Prompt tokens found cached", registry=registry)
        self.output_tokens = Counter("omni_proxy_output_tokens", "Generated tokens", registry=registry)
        self.decisions = Labelled(
            Counter("omni_proxy_decisions", "How prompts came to be computed", ["reason", "policy"], registry=registry)
        )
        self.first_tokens = Labelled(
            Counter("omni_proxy_first_tokens", "First tokens by source", ["source"], registry=registry)
        )
        retries = Counter("omni_proxy_retries", "Legs tried again before a token", ["leg"], registry=registry)
        self.retries = from_zero(retries, ("prefill", "decode"))
        self.resumes = Counter("omni_proxy_resumes", "Sequences continued on another session", registry=registry)
        self.aborts = Counter("omni_proxy_aborts", "Running sequences stopped from here", registry=registry)
        self.releases = Counter("omni_proxy_kv_releases", "Leases ended early", registry=registry)
        self.text_seconds = Counter(
            "omni_proxy_detokenize_seconds", "Time spent on output text, in whole requests' sums", registry=registry
        )
        self.workers = Gauge("omni_proxy_workers", "Workers that take work", ["role"], registry=registry)
        self.membership_age = Gauge(
            "omni_proxy_membership_age_seconds", "Since the kvstore was last heard", registry=registry
        )
        self.prediction_error = Labelled(
            Histogram(
                "omni_proxy_prediction_error_ratio",
                "Difference of predicted and seen time, as a share of what was seen",
                ["model"],
                buckets=_ERROR,
                registry=registry,
            )
        )
        self.prediction_confidence = Gauge(
            "omni_proxy_prediction_confidence",
            "Mean of workers; 0: nothing was seen yet, 1: much, and as predicted",
            ["model"],
            registry=registry,
        )
        self.phases = PhaseMetrics(registry)
        self.tenants = TenantMetrics(registry)
        self.prefix = PrefixMetrics(registry)
        self.health = HealthMetrics(registry)

    def decided(self, decision: Decision) -> None:
        """How a prompt comes to be computed."""
        self.decisions.labels(decision.reason, decision.policy).inc()

    def forget_adapter(self, name: str) -> None:
        """Nobody can ask for it any more."""
        with suppress(KeyError):
            self.adapter_requests.remove(name)

    def ejected(self, cause: Cause) -> None:
        self.health.ejections.labels(cause).inc()

    def spared(self, cause: Cause) -> None:
        self.health.spared.labels(cause).inc()

    def predicted(self, model: str, seen: Seen) -> None:
        """A prediction beside what came."""
        if seen.seen_ms > 0:
            self.prediction_error.labels(model).observe(seen.error)


class HealthMetrics:
    """Sick workers, and what was done about them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.workers = Gauge("omni_proxy_worker_health", "Reachable workers by circuit", ["state"], registry=registry)
        ejections = Counter("omni_proxy_ejections", "Workers taken out", ["cause"], registry=registry)
        self.ejections = from_zero(ejections, Cause)
        spared = Counter(
            "omni_proxy_ejections_spared", "Not taken out, since too many others are", ["cause"], registry=registry
        )
        self.spared = from_zero(spared, Cause)
        hedges = Counter("omni_proxy_hedges", "Second prefills by who answered first", ["won"], registry=registry)
        self.hedges = from_zero(hedges, ("first", "second", "neither"))
        replays = Counter(
            "omni_proxy_replays", "Resumptions that ran a sequence again from its prompt", ["end"], registry=registry
        )
        self.replays = from_zero(replays, ("same", "differs"))
        self.fallbacks = Counter(
            "omni_proxy_pull_fallbacks", "Prompts computed on decode as no blocks arrived", registry=registry
        )
        self.inexact = Counter(
            "omni_proxy_inexact_resumes", "Resumed otherwise than an undisturbed run would go on", registry=registry
        )


class PrefixMetrics:
    """The replica of the prefix index, and what its forecasts were worth."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, registry=registry)

        self.blocks = gauge("omni_proxy_prefix_blocks", "Blocks in the replica")
        self.entries = gauge("omni_proxy_prefix_entries", "Pairs of block and holder in the replica")
        self.bytes = gauge("omni_proxy_prefix_bytes", "Memory of the replica")
        self.age = gauge("omni_proxy_prefix_age_seconds", "Since the replica was last known to be current")
        self.degraded = gauge("omni_proxy_prefix_degraded", "1 while the kvstore answers from memory")
        self.marks_running = gauge("omni_proxy_prefix_marks_running", "Legs whose blocks are being computed")
        self.evicted = counter("omni_proxy_prefix_evicted_blocks", "Blocks dropped for want of room")
        self.snapshots = counter("omni_proxy_prefix_snapshots", "Snapshots taken over whole")
        self.resumes = counter("omni_proxy_prefix_resumes", "Watches continued from a position")
        self.deltas = counter("omni_proxy_prefix_deltas", "Block changes applied outside snapshots", "action")
        self.ignored = counter("omni_proxy_prefix_ignored", "Block changes of unknown members or ended epochs")
        self.lookup = Histogram(
            "omni_proxy_prefix_lookup_seconds", "One prompt, all workers", buckets=_LOOKUP, registry=registry
        )
        self.depth = Histogram(
            "omni_proxy_prefix_depth_tokens", "Longest prefix known of a prompt", buckets=_DEPTH, registry=registry
        )
        self.marks = Labelled(
            counter("omni_proxy_prefix_marks", "Legs whose blocks were marked as expected, by end", "end")
        )
        self.forecasts = Labelled(
            counter("omni_proxy_prefix_forecasts", "Cached tokens reported beside the forecast", "result")
        )
        self.forecast_error = Labelled(
            counter("omni_proxy_prefix_forecast_error_tokens", "Tokens by which the forecast was wrong", "result")
        )
        self.keys = Labelled(
            counter("omni_proxy_prefix_keys", "Block keys of prompts by where they came from", "source")
        )

    def compare(self, predicted: int, reported: int) -> None:
        """`less`: the engine had fewer tokens cached than the replica said."""
        result = "exact" if reported == predicted else "less" if reported < predicted else "more"
        self.forecasts.labels(result).inc()
        self.forecast_error.labels(result).inc(abs(reported - predicted))
