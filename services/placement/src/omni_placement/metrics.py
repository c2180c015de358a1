"""What the service counts."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_GROUP = ["model", "group"]


class Metrics:
    """Names are listed in README.md."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, labels: list[str]) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        self.windows = counter("omni_placement_windows", "Load windows by outcome", ["outcome"])
        self.plan_seconds = Histogram(
            "omni_placement_plan_seconds", "Time of a plan, judging included", ["solver"], registry=registry
        )
        self.layout_version = gauge("omni_placement_layout_version", "Version in force", _GROUP)
        self.applied_version = gauge(
            "omni_placement_applied_version", "Newest version that a worker said it applied", _GROUP
        )
        self.balancedness = gauge("omni_placement_balancedness", "Least of a layer under the load planned with", _GROUP)
        self.measured_imbalance = gauge(
            "omni_placement_measured_imbalance", "Slowest over mean rank, newest report", _GROUP
        )
        self.predicted_imbalance = gauge(
            "omni_placement_predicted_imbalance", "The same, of the layout in force", _GROUP
        )
        self.decisions = counter("omni_placement_decisions", "Looks at a group by reason", [*_GROUP, "reason"])
        self.migrations = counter("omni_placement_migrations", "Migrations by outcome", [*_GROUP, "outcome"])
        self.rounds = counter("omni_placement_rounds", "Migration rounds applied", _GROUP)
        self.moved_bytes = counter("omni_placement_moved_bytes", "Expert weights sent between ranks", _GROUP)
        self.watches = Gauge("omni_placement_watches", "Open watches", registry=registry)
