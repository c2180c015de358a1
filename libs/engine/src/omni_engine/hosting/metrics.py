"""Prometheus metrics of a worker. Load is read from the engine when scraped."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from omni_engine.hosting.events import RelayReport
from omni_engine.hosting.placement import PlacementReport
from omni_engine.ports import EngineStats, KernelCalls, SequenceStart

_PREFILL_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class WorkerMetrics:
    """Counters and histograms the hosting writes."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._prefill_s = Histogram(
            "omni_worker_prefill_seconds",
            "Prefill from acceptance to answer",
            buckets=_PREFILL_BUCKETS_S,
            registry=registry,
        )
        self._prompt = Counter(
            "omni_worker_prompt_tokens_total", "Prompt tokens, by where they came from", ["source"], registry=registry
        )
        self._pulls = Counter("omni_worker_pulls_total", "Sequences whose blocks were pulled", registry=registry)
        self._fallbacks = Counter(
            "omni_worker_fallbacks_total", "Pulls that failed, so that the prompt was computed here", registry=registry
        )
        self._aborts = Counter("omni_worker_aborts_total", "Work ended early, by cause", ["cause"], registry=registry)
        self._sessions_broken = Counter(
            "omni_worker_sessions_overrun_total", "Sessions ended because their peer did not read", registry=registry
        )
        self._transfer_s = Histogram(
            "omni_worker_transfer_seconds", "Wait for pulled blocks", buckets=_PREFILL_BUCKETS_S, registry=registry
        )

    def prefill_done(self, seconds: float, prompt_tokens: int, cached_tokens: int) -> None:
        self._prefill_s.observe(seconds)
        self._prompt.labels("cached").inc(cached_tokens)
        self._prompt.labels("computed").inc(prompt_tokens - cached_tokens)

    def sequence_started(self, start: SequenceStart, prompt_tokens: int) -> None:
        self._prompt.labels("cached").inc(start.cached_tokens)
        self._prompt.labels("pulled").inc(start.pulled_tokens)
        self._prompt.labels("computed").inc(max(0, prompt_tokens - start.cached_tokens - start.pulled_tokens))
        if start.pulled_tokens:
            self._pulls.inc()
            self._transfer_s.observe(start.timings.transfer_ms / 1e3)
        if start.fell_back:
            self._fallbacks.inc()

    def aborted(self, cause: str, count: int = 1) -> None:
        self._aborts.labels(cause).inc(count)

    def session_overrun(self) -> None:
        self._sessions_broken.inc()


class LoadCollector(Collector):
    """Gauges and totals out of the engine's own stats."""

    def __init__(self, read: Callable[[], EngineStats | None], refused: Callable[[], int]) -> None:
        self._read = read
        self._refused = refused

    def collect(self) -> Iterable[Metric]:
        yield CounterMetricFamily("omni_worker_refused", "Work that was not taken", value=self._refused())
        stats = self._read()
        if stats is None:
            return
        gauges = {
            "omni_worker_running": ("Sequences in the running batch", stats.running),
            "omni_worker_waiting": ("Sequences not scheduled yet", stats.waiting),
            "omni_worker_queued_tokens": ("Accepted prompt tokens not computed yet", stats.queued_tokens),
            "omni_worker_kv_usage_ratio": ("Share of KV blocks in use", stats.kv_usage),
            "omni_worker_context_tokens": ("Tokens of the sequences that generate", stats.context_tokens),
            "omni_worker_leases": ("Finished prefills still held", stats.leases),
            "omni_worker_step_seconds": ("Moving average of an engine step", stats.step_ms / 1e3),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        yield CounterMetricFamily("omni_worker_generated_tokens", "Tokens generated", value=stats.generated_tokens)
        yield CounterMetricFamily(
            "omni_worker_computed_prompt_tokens", "Prompt tokens computed", value=stats.computed_prompt_tokens
        )
        yield CounterMetricFamily("omni_worker_steps", "Steps that generated, their time known", value=stats.steps)
        yield CounterMetricFamily("omni_worker_busy_seconds", "Time of these steps", value=stats.busy_ms / 1e3)
        yield from _speculation(stats)


class BlocksCollector(Collector):
    """Block events, out of the relay's own report."""

    def __init__(self, read: Callable[[], RelayReport | None]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        report = self._read()
        if report is None:
            return
        yield _by_label("omni_worker_block_events", "Events of the engine, by kind", "event", report.events)
        yield _by_label(
            "omni_worker_blocks_skipped",
            "Blocks of the engine's events not placed, by reason",
            "reason",
            report.skipped,
        )
        totals = {
            "omni_worker_block_event_gaps": ("Breaks in the engine's stream of events", report.gaps),
            "omni_worker_block_event_replays": ("Batches of events fetched again after a gap", report.replayed),
            "omni_worker_block_mirror_resets": ("Times all mirrored blocks were dropped", report.resets),
            "omni_worker_block_snapshots": ("Snapshots sent to the kvstore", report.snapshots),
        }
        for name, (text, value) in totals.items():
            yield CounterMetricFamily(name, text, value=value)
        yield GaugeMetricFamily("omni_worker_pending_blocks", "Changes not sent yet", value=report.pending)
        yield GaugeMetricFamily("omni_worker_mirrored_blocks", "Blocks of the engine mirrored", value=report.mirrored)


class PlacementCollector(Collector):
    """Expert layouts and load, out of the placement client's own report."""

    def __init__(self, read: Callable[[], PlacementReport | None]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        report = self._read()
        if report is None:
            return
        gauges = {
            "omni_worker_placement_connected": ("1 while layouts are followed", report.is_connected),
            "omni_worker_expert_layout_version": ("Version that the ranks hold", report.layout_version),
            "omni_worker_expert_rank_imbalance_ratio": (
                "Slowest over mean rank in the newest window, 0 before it",
                report.rank_imbalance,
            ),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        yield CounterMetricFamily("omni_worker_expert_rounds", "Rounds of expert moves applied", value=report.rounds)
        yield CounterMetricFamily("omni_worker_expert_moves", "Experts copied between slots", value=report.moves)
        yield _by_label(
            "omni_worker_expert_migrations", "Layouts that needed moves, by outcome", "outcome", report.migrations
        )
        yield _by_label(
            "omni_worker_expert_load_reports", "Reports of expert load, by outcome", "outcome", report.load_reports
        )


class KernelsCollector(Collector):
    """Calls of Omni's ops in the engine's processes."""

    def __init__(self, read: Callable[[], KernelCalls]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(
            "omni_engine_kernel_calls", "Calls of Omni's ops, all ranks together", labels=["op", "backend"]
        )
        for op, backends in self._read().items():
            for backend, calls in backends.items():
                family.add_metric([op, backend], calls)
        yield family


def _speculation(stats: EngineStats) -> Iterable[Metric]:
    """The acceptance rate is accepted over drafted; that of a position is its count over drafts."""
    totals = {
        "omni_worker_drafts": ("Drafts verified", stats.drafts),
        "omni_worker_drafted_tokens": ("Tokens drafted and verified", stats.drafted_tokens),
        "omni_worker_accepted_tokens": ("Drafted tokens that were right", stats.accepted_tokens),
    }
    for name, (text, value) in totals.items():
        yield CounterMetricFamily(name, text, value=value)
    by_position = {str(position): count for position, count in enumerate(stats.accepted_by_position)}
    yield _by_label(
        "omni_worker_accepted_at", "Drafted tokens that were right, by place in the draft", "position", by_position
    )


def _by_label(name: str, text: str, label: str, values: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
