"""What the service counts."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """Names start with `omni_placement_`; they are listed in README.md."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.windows = Counter("omni_placement_windows", "Load windows by outcome", ["outcome"], registry=registry)
        self.plan_seconds = Histogram("omni_placement_plan_seconds", "Time of a plan", ["solver"], registry=registry)
        self.layout_version = Gauge("omni_placement_layout_version", "Version in force", ["model"], registry=registry)
        self.balancedness = Gauge(
            "omni_placement_balancedness",
            "Least of a layer, when last published",
            ["model"],
            registry=registry,
        )
        self.watches = Gauge("omni_placement_watches", "Open watches", registry=registry)
