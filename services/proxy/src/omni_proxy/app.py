"""The only place that constructs collaborators."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from fastapi import FastAPI
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry

from omni_common.key_cache import KeyCache
from omni_common.prefix_index import PrefixIndex
from omni_common.prefix_index import warm_up as warm_up_index
from omni_common.rpc import channel
from omni_proxy.adapters import KnownAdapters
from omni_proxy.admission import Admission
from omni_proxy.bodies import HttpLimits
from omni_proxy.config_watch import ConfigMetrics, ConfigPage, ConfigWatcher, Live
from omni_proxy.fleet import Fleet
from omni_proxy.flow.gate import FlowGate
from omni_proxy.flow.metrics import FlowMetrics
from omni_proxy.flow.queue import FlowQueue
from omni_proxy.health import Health
from omni_proxy.hedging import Hedging
from omni_proxy.http import Api, create_app
from omni_proxy.kv_pages import KvPages
from omni_proxy.links import WorkerLink
from omni_proxy.live_policy import LivePolicy
from omni_proxy.membership import KvStoreMembership, StaticMembership
from omni_proxy.metrics import Metrics
from omni_proxy.openai_requests import Served
from omni_proxy.prompt_keys import PromptKeys
from omni_proxy.pulse import Pulse
from omni_proxy.replica import Replica
from omni_proxy.room import FleetRoom
from omni_proxy.roster import Roster
from omni_proxy.saturation import Saturation, SaturationMetrics, Waiting
from omni_proxy.schedule_config import ScheduleConfig
from omni_proxy.scheduling.forecast import LoadCost
from omni_proxy.scheduling.times import WorkerTimes
from omni_proxy.scheduling.warming import warm_up as warm_up_choices
from omni_proxy.sequence import Limits, OutputLengths, Scheduler
from omni_proxy.settings import Settings
from omni_proxy.status import StatusPages
from omni_proxy.tenants import Tenants
from omni_proxy.text import ModelText
from omni_proxy.worker import Worker

_RELEASE_KV = "omni.prefill.v1.PrefillService/ReleaseKv"
_DESCRIBE = "omni.engine.v1.WorkerService/Describe"


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running proxy: the ASGI application, and what its owner watches."""

    app: FastAPI
    fleet: Fleet
    admission: Admission


@asynccontextmanager
async def running(settings: Settings, registry: CollectorRegistry, tracer: Tracer) -> AsyncIterator[Proxy]:
    """Build the proxy and keep its connections while the block runs."""
    text = ModelText(settings.model_dir, settings.output_format)
    metrics = Metrics(registry)
    # Before anything is served: the first lookup and choice would hold up the event loop for seconds.
    await asyncio.to_thread(warm_up_index)
    await asyncio.to_thread(warm_up_choices)
    base = _base(settings)
    live = Live(base if settings.scheduler_config is None else ScheduleConfig.load(settings.scheduler_config, base))
    fleet = _fleet(settings, live.value, metrics)
    admission = Admission(settings.max_inflight, metrics)
    proxy_id = _proxy_id(settings)

    def connect(address: str) -> grpc.aio.Channel:
        return channel(address, tls=settings.tls, idempotent=(_RELEASE_KV, _DESCRIBE))

    def link(worker: Worker) -> WorkerLink:
        return WorkerLink(
            worker,
            connect(worker.address),
            proxy_id,
            settings.connect_timeout_s,
            settings.stats_interval_ms,
            metrics,
            fleet.signal,
            fleet.health,
        )

    async with Roster(fleet, link, settings.request_timeout_s) as roster:
        kvstore = None
        if settings.kvstore:
            kvstore = KvStoreMembership(settings.kvstore, settings.model, connect, roster, fleet.replica)
        statics = [StaticMembership(a, connect, roster, settings.connect_timeout_s) for a in settings.workers]
        steering = _steering(settings.scheduler_config, base, live, fleet, registry)
        api = _api(settings, text, fleet, metrics, admission, tracer, steering)
        pulse = Pulse(registry)
        saturation = Saturation(fleet, lambda: live.value.slo.slo, steering.waiting, pulse)
        explanations = api.scheduler.explanations
        pages = StatusPages(fleet, admission, metrics, kvstore, settings.model, explanations, saturation, statics)
        metrics.readings.use(pages.observe, SaturationMetrics(saturation, registry).observe)
        kv = KvPages(fleet, api.scheduler.keys, text, api.served, api.limits)
        config = ConfigPage(live, settings.scheduler_config)
        watched = [source for source in (pulse, kvstore, steering.watcher, *statics) if source is not None]
        sources = [asyncio.create_task(source.run()) for source in watched]
        try:
            yield Proxy(create_app(api, pages, kv, config), fleet, admission)
        finally:
            for source in sources:
                source.cancel()
            await asyncio.gather(*sources, return_exceptions=True)


def _proxy_id(settings: Settings) -> str:
    return settings.proxy_id or f"proxy-{socket.gethostname()}-{os.getpid()}"


def _fleet(settings: Settings, config: ScheduleConfig, metrics: Metrics) -> Fleet:
    def make_index() -> PrefixIndex:
        return PrefixIndex(max_blocks=settings.index_blocks)

    load_costs = {
        "host": LoadCost(0.0, settings.host_ms_per_block),
        "disk": LoadCost(0.0, settings.disk_ms_per_block),
        "remote": LoadCost(0.0, settings.remote_ms_per_block),
    }
    replica = Replica(make_index, settings.expected_ttl_s, metrics.prefix)
    health = Health(config.health, metrics.ejected, metrics.spared)
    return Fleet(
        settings.model,
        replica,
        load_costs,
        now=asyncio.get_running_loop().time,
        times=lambda columns: WorkerTimes(columns, make=config.predictor.make()),
        health=health,
        saw_step=lambda seen: metrics.predicted("step", seen),
        adapters=KnownAdapters(on_forgotten=metrics.forget_adapter, taken=(settings.model, *settings.model_aliases)),
    )


@dataclass(frozen=True, slots=True)
class _Steering:
    """What the scheduler's configuration governs, while it runs too."""

    policy: LivePolicy
    gate: FlowGate
    room: FleetRoom
    tenants: Tenants
    hedging: Hedging
    watcher: ConfigWatcher | None

    def waiting(self) -> Waiting:
        head = self.gate.head
        return Waiting(self.gate.waiting_ms, head is not None and self.room.is_short_of_decode(head))


def _steering(
    path: Path | None, base: ScheduleConfig, live: Live[ScheduleConfig], fleet: Fleet, registry: CollectorRegistry
) -> _Steering:
    config, metrics, flow_metrics = live.value, ConfigMetrics(registry), FlowMetrics(registry)
    room = FleetRoom(fleet, config.flow.lookahead_ms)
    gate = FlowGate(FlowQueue(config.flow), room, flow_metrics)
    fleet.subscribe(gate.workers_changed)
    policy, tenants = LivePolicy(config), Tenants(config.tenants, config.slo.slo, flow_metrics)
    hedging = Hedging(config.hedging)
    metrics.show(config)

    def apply(new: ScheduleConfig) -> None:
        # First what may fail, by a plug-in: what tenants have used is not to be lost in a change that does not hold.
        policy.reconfigure(new)
        gate.reconfigure(new.flow)
        room.lookahead_ms = new.flow.lookahead_ms
        tenants.reconfigure(new.tenants, new.slo.slo)
        fleet.health.settings = new.health
        hedging.settings = new.hedging

    live.subscribe(apply)
    watcher = None if path is None else ConfigWatcher(path, base, live, metrics)
    return _Steering(policy, gate, room, tenants, hedging, watcher)


def _base(settings: Settings) -> ScheduleConfig:
    """What holds where the scheduler's file says nothing."""
    values = {"disaggregate_min_tokens": settings.disaggregate_min_tokens} if settings.disaggregate_min_tokens else {}
    policy = {"name": settings.policy, "parameters": values}
    return ScheduleConfig.of({"policy": policy, "health": settings.health, "hedging": settings.hedging})


def _api(
    settings: Settings,
    text: ModelText,
    fleet: Fleet,
    metrics: Metrics,
    admission: Admission,
    tracer: Tracer,
    steering: _Steering,
) -> Api:
    limits = Limits(settings.max_attempts, settings.resume_timeout_s)
    defaults = text.sampling_defaults if settings.generation_defaults == "model" else {}
    keys = PromptKeys(settings.model, KeyCache(settings.key_cache_bytes), metrics.prefix)
    return Api(
        scheduler=Scheduler(
            fleet,
            steering.policy,
            metrics,
            settings.model,
            limits,
            keys,
            OutputLengths(),
            steering.gate,
            _proxy_id(settings),
            hedging=steering.hedging,
        ),
        text=text,
        served=Served(
            settings.model,
            settings.model_aliases,
            text.vocab_size,
            defaults,
            settings.max_sequences_per_request,
            fleet.adapters,
        ),
        admission=admission,
        limits=HttpLimits(settings.max_body_bytes, settings.body_timeout_s, settings.request_timeout_s),
        tracer=tracer,
        tenants=steering.tenants,
    )
