"""Prometheus metrics of the proxy."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_LATENCY = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_GAP = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """Names start with `omni_proxy_`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter("omni_proxy_requests", "Requests by HTTP status", ["code"], registry=registry)
        self.running = Gauge("omni_proxy_running_sequences", "Sequences in flight", registry=registry)
        self.ttft = Histogram("omni_proxy_ttft_seconds", "To the first token", buckets=_LATENCY, registry=registry)
        self.e2e = Histogram("omni_proxy_e2e_seconds", "Whole requests", buckets=_LATENCY, registry=registry)
        self.frame_gap = Histogram(
            "omni_proxy_itl_seconds", "Gap between step frames of a busy session", buckets=_GAP, registry=registry
        )
        self.prompt_tokens = Counter("omni_proxy_prompt_tokens", "Prompt tokens", registry=registry)
        self.cached_tokens = Counter("omni_proxy_cached_tokens", "Prompt tokens found cached", registry=registry)
        self.output_tokens = Counter("omni_proxy_output_tokens", "Generated tokens", registry=registry)
        self.decisions = Counter("omni_proxy_decisions", "Scheduling decisions", ["reason"], registry=registry)
        self.first_tokens = Counter("omni_proxy_first_tokens", "First tokens by source", ["source"], registry=registry)
        self.retries = Counter("omni_proxy_retries", "Legs tried again before a token", ["leg"], registry=registry)
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
