"""The only place that constructs collaborators."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
from fastapi import FastAPI
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry

from omni_common.key_cache import KeyCache
from omni_common.prefix_index import PrefixIndex, warm_up
from omni_common.rpc import channel
from omni_proxy.admission import Admission
from omni_proxy.bodies import HttpLimits
from omni_proxy.fleet import Fleet, Worker
from omni_proxy.flow.gate import FlowGate
from omni_proxy.flow.metrics import FlowMetrics
from omni_proxy.flow.queue import FlowQueue
from omni_proxy.flow.settings import FlowSettings
from omni_proxy.http import Api, create_app
from omni_proxy.kv_pages import KvPages
from omni_proxy.links import WorkerLink
from omni_proxy.membership import KvStoreMembership, StaticMembership
from omni_proxy.metrics import Metrics
from omni_proxy.openai_requests import Served
from omni_proxy.prompt_keys import PromptKeys
from omni_proxy.replica import Replica
from omni_proxy.room import FleetRoom
from omni_proxy.roster import Roster
from omni_proxy.scheduling.forecast import LoadCost
from omni_proxy.scheduling.interfaces import Policy
from omni_proxy.scheduling.policies import policy_of
from omni_proxy.sequence import Limits, OutputLengths, Scheduler
from omni_proxy.settings import Settings
from omni_proxy.status import StatusPages
from omni_proxy.text import ModelText

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
    text = ModelText(settings.model_dir)
    metrics = Metrics(registry)
    # Before anything is served: the first lookup would hold up the event loop for seconds.
    await asyncio.to_thread(warm_up)
    fleet = _fleet(settings, metrics)
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
        )

    async with Roster(fleet, link, settings.request_timeout_s) as roster:
        kvstore = None
        if settings.kvstore:
            kvstore = KvStoreMembership(settings.kvstore, settings.model, connect, roster, fleet.replica)
        statics = [StaticMembership(a, connect, roster, settings.connect_timeout_s) for a in settings.workers]
        pages = StatusPages(fleet, admission, metrics, kvstore, settings.model)
        api = _api(settings, text, fleet, metrics, admission, tracer)
        kv = KvPages(fleet, api.scheduler.keys, text, api.served, api.limits)
        sources = [asyncio.create_task(s.run()) for s in ([kvstore] if kvstore else []) + statics]
        try:
            yield Proxy(create_app(api, pages, kv), fleet, admission)
        finally:
            for source in sources:
                source.cancel()
            await asyncio.gather(*sources, return_exceptions=True)


def _proxy_id(settings: Settings) -> str:
    return settings.proxy_id or f"proxy-{socket.gethostname()}-{os.getpid()}"


def _fleet(settings: Settings, metrics: Metrics) -> Fleet:
    def make_index() -> PrefixIndex:
        return PrefixIndex(max_blocks=settings.index_blocks)

    load_costs = {
        "host": LoadCost(0.0, settings.host_ms_per_block),
        "disk": LoadCost(0.0, settings.disk_ms_per_block),
        "remote": LoadCost(0.0, settings.remote_ms_per_block),
    }
    replica = Replica(make_index, settings.expected_ttl_s, metrics.prefix)
    return Fleet(settings.model, replica, load_costs, now=asyncio.get_running_loop().time)


def _policy(settings: Settings) -> Policy:
    values = {"disaggregate_min_tokens": settings.disaggregate_min_tokens} if settings.disaggregate_min_tokens else {}
    return policy_of(settings.policy, values)


def _gate(fleet: Fleet, flow: FlowSettings, registry: CollectorRegistry) -> FlowGate:
    return FlowGate(FlowQueue(flow), FleetRoom(fleet, flow.lookahead_ms), FlowMetrics(registry))


def _api(
    settings: Settings, text: ModelText, fleet: Fleet, metrics: Metrics, admission: Admission, tracer: Tracer
) -> Api:
    policy = _policy(settings)
    gate = _gate(fleet, FlowSettings(), metrics.registry)
    limits = Limits(settings.max_attempts, settings.resume_timeout_s)
    defaults = text.sampling_defaults if settings.generation_defaults == "model" else {}
    keys = PromptKeys(settings.model, KeyCache(settings.key_cache_bytes), metrics.prefix)
    return Api(
        scheduler=Scheduler(
            fleet, policy, metrics, settings.model, limits, keys, OutputLengths(), gate, _proxy_id(settings)
        ),
        text=text,
        served=Served(
            settings.model, settings.model_aliases, text.vocab_size, defaults, settings.max_sequences_per_request
        ),
        admission=admission,
        limits=HttpLimits(settings.max_body_bytes, settings.body_timeout_s, settings.request_timeout_s),
        tracer=tracer,
    )
