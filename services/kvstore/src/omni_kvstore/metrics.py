"""What a replica counts."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from omni_common.prefix_index import Usage

_LATENCY_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 2.5)
_LAG_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_DEPTH_BLOCKS = (0, 1, 4, 16, 64, 256, 1024, 4096, 16384)


class Metrics:
    """Names start with `omni_kvstore_`; they are listed in README.md."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.blocks = Counter("omni_kvstore_blocks", "Blocks in accepted events", ["action"], registry=registry)
        self.batches = Counter("omni_kvstore_batches", "Batches by outcome", ["outcome"], registry=registry)
        self.lag_seconds = Histogram(
            "omni_kvstore_event_lag_seconds",
            "From an engine's first event of a batch to its acceptance",
            buckets=_LAG_S,
            registry=registry,
        )
        self.lookup_seconds = Histogram(
            "omni_kvstore_lookup_seconds", "Time of a lookup", ["source"], buckets=_LATENCY_S, registry=registry
        )
        self.hit_depth = Histogram(
            "omni_kvstore_hit_blocks", "Longest prefix a lookup found", buckets=_DEPTH_BLOCKS, registry=registry
        )
        self.redis_seconds = Histogram(
            "omni_kvstore_redis_seconds",
            "Time of a Redis operation",
            ["operation"],
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.entries = Gauge("omni_kvstore_entries", "Known (block, worker) entries in Redis", registry=registry)
        self.evicted = Counter("omni_kvstore_evicted_blocks", "Blocks dropped to keep the bounds", registry=registry)
        self.redis_bytes = Gauge("omni_kvstore_redis_bytes", "Memory of the Redis process", registry=registry)
        self.memory_entries = Gauge("omni_kvstore_memory_entries", "Entries in this replica", registry=registry)
        self.memory_bytes = Gauge("omni_kvstore_memory_bytes", "Memory of those entries", registry=registry)
        self.leases = Gauge("omni_kvstore_leases", "Workers with a lease", registry=registry)
        self.leases_ended = Counter("omni_kvstore_leases_ended", "Leases that ran out", registry=registry)
        self.watchers = Gauge("omni_kvstore_watchers", "Open watches", registry=registry)
        self.snapshots = Counter("omni_kvstore_watch_snapshots", "Snapshots begun for watchers", registry=registry)
        self.resumes = Counter("omni_kvstore_watch_resumes", "Watches continued without a snapshot", registry=registry)
        self.degraded = Gauge("omni_kvstore_degraded", "1 while Redis cannot be reached", registry=registry)
        self.unswept_runs = Gauge("omni_kvstore_unswept_runs", "Ended runs with entries to remove", registry=registry)

    def show_memory(self, usage: Usage) -> None:
        self.memory_entries.set(usage.entries)
        self.memory_bytes.set(usage.bytes)
