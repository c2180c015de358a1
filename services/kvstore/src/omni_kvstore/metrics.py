"""What a replica counts."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_LATENCY_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 2.5)


class Metrics:
    """Names start with `omni_kvstore_`; they are listed in README.md."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.blocks = Counter("omni_kvstore_blocks", "Blocks in accepted events", ["action"], registry=registry)
        self.batches = Counter("omni_kvstore_batches", "Batches by outcome", ["outcome"], registry=registry)
        self.lookup_seconds = Histogram(
            "omni_kvstore_lookup_seconds", "Time of a lookup", buckets=_LATENCY_S, registry=registry
        )
        self.redis_seconds = Histogram(
            "omni_kvstore_redis_seconds",
            "Time of a Redis operation",
            ["operation"],
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.entries = Gauge("omni_kvstore_entries", "Known (block, worker, medium) entries", registry=registry)
        self.leases = Gauge("omni_kvstore_leases", "Workers with a lease", registry=registry)
        self.leases_ended = Counter("omni_kvstore_leases_ended", "Leases that ran out", registry=registry)
        self.watchers = Gauge("omni_kvstore_watchers", "Open watches", registry=registry)
        self.snapshots = Counter("omni_kvstore_watch_snapshots", "Snapshots begun for watchers", registry=registry)
        self.degraded = Gauge("omni_kvstore_degraded", "1 while Redis cannot be reached", registry=registry)
        self.unswept_runs = Gauge("omni_kvstore_unswept_runs", "Ended runs with entries to remove", registry=registry)
