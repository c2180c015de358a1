"""What the dashboard asks of the metrics of all services, they have."""

import json
import re
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.metrics import MetricWrapperBase

from omni_engine.hosting.events import RelayReport
from omni_engine.hosting.metrics import (
    BlocksCollector,
    KernelsCollector,
    LoadCollector,
    PlacementCollector,
    WorkerMetrics,
)
from omni_engine.hosting.placement import PlacementReport
from omni_engine.ports import EngineStats
from omni_kvstore.metrics import Metrics as KvStoreMetrics
from omni_placement.metrics import Metrics as PlacementMetrics

DASHBOARD = Path(__file__).parents[3] / "deploy" / "observability" / "grafana" / "omni.json"
OF_ANY_SCRAPE = {"le", "job", "instance"}


def others() -> CollectorRegistry:
    """What workers, kvstores and the placement service tell."""
    registry = CollectorRegistry()
    WorkerMetrics(registry)
    KvStoreMetrics(registry)
    PlacementMetrics(registry)
    once = {"any": 1}
    for collector in (
        LoadCollector(lambda: EngineStats(accepted_by_position=(1,)), lambda: 0),
        BlocksCollector(lambda: RelayReport(once, once, 0, 0, 0, 0, 0, 0)),
        PlacementCollector(lambda: PlacementReport(True, 1, 1.0, 0, 0, once, once)),
        KernelsCollector(lambda: {"op": once}),
    ):
        registry.register(collector)
    return registry


def labels_of(registry: CollectorRegistry) -> dict[str, set[str]]:
    """By the name of a series. Families whose samples have a suffix have no series of their own name."""
    labels = {
        name: set(of._labelnames)
        for name, of in registry._names_to_collectors.items()
        if isinstance(of, MetricWrapperBase) and (isinstance(of, Gauge) or name != of._name)
    }
    for family in registry.collect():
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


async def test_every_metric_of_a_panel_has_the_labels_it_is_split_by(start: Any) -> None:
    stack = await start("p d")
    labels = labels_of(stack.registry) | labels_of(others())
    asked = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            expression, legend = target["expr"], target.get("legendFormat", "")
            split = {label for by in re.findall(r"by \(([^)]*)\)", expression) for label in re.findall(r"\w+", by)}
            split |= set(re.findall(r"{{(\w+)}}", legend))
            for name in re.findall(r"omni_\w+", expression):
                asked.add(name)
                assert name in labels, f"{panel['title']}: {name}"
                assert split - OF_ANY_SCRAPE <= labels[name], f"{panel['title']}: {expression} as {legend!r}"
    assert {name.split("_")[1] for name in asked} == {"proxy", "worker", "kvstore", "placement"}
    assert len(asked) > 60
