"""Puts the service together and runs it."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry
from redis.exceptions import RedisError

from omni_common import telemetry
from omni_common.errors import FailedPrecondition, Unavailable
from omni_common.prefix_index import warm_up
from omni_common.rpc import Server, run_until_signal
from omni_kvstore import __version__
from omni_kvstore.client import connect, library_client
from omni_kvstore.embedded import EmbeddedRedis
from omni_kvstore.feed import Feed
from omni_kvstore.membership import Leases
from omni_kvstore.metrics import Metrics
from omni_kvstore.migrate import migrate
from omni_kvstore.replica import Replica
from omni_kvstore.rpc import KvStoreServicer, servicer
from omni_kvstore.settings import Settings
from omni_kvstore.store import Limits, RedisStore
from omni_kvstore.watches import Watches

log = logging.getLogger(__name__)

_DEFAULT_URL = "redis://127.0.0.1:6379/0"
_REAPS_PER_LEASE = 10
_LONGEST_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class KvStore:
    """A running service."""

    server: Server
    replica: Replica
    watches: Watches
    port: int
    feed: Feed

    async def drain(self) -> None:
        """End the watches, so that watchers go to another replica."""
        self.feed.close()


@asynccontextmanager
async def running(settings: Settings, registry: CollectorRegistry) -> AsyncIterator[KvStore]:
    """The service on its port, SERVING once Redis has answered; everything it started ends on exit."""
    async with AsyncExitStack() as stack:
        url = settings.redis_url or _DEFAULT_URL
        embedded = None
        if settings.redis_url is None and settings.embedded_redis_dir is not None:
            embedded = EmbeddedRedis(settings.embedded_redis_dir)
            stack.push_async_callback(embedded.stop)
            await embedded.start()
            url = embedded.url
        await asyncio.to_thread(warm_up)
        metrics, feed = Metrics(registry), Feed(settings.watch_queue)
        store = _store(settings, url, metrics)
        stack.push_async_callback(store.close)
        replica = _replica(settings, store, feed, metrics)
        watches = Watches(replica.view, feed, store, metrics)
        wire = KvStoreServicer(
            replica, watches, metrics, lease_s=settings.lease_s, max_lookup_blocks=settings.max_lookup_blocks
        )
        server = Server([servicer(wire)], settings.tls)
        port = await server.start(f"{settings.host}:{settings.port}", serving=False)
        stack.push_async_callback(server.stop, 0.0)
        stack.callback(feed.close)
        async with asyncio.TaskGroup() as tasks:
            loops = [
                replica.follow(),
                replica.keep(settings.lease_s / _REAPS_PER_LEASE),
                _announce(settings, server, replica),
            ]
            loops += [embedded.supervise()] if embedded else []
            owned = [tasks.create_task(loop) for loop in loops]
            yield KvStore(server, replica, watches, port, feed)
            for task in owned:
                task.cancel()


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT."""
    instance = f"{socket.gethostname()}:{settings.port}"
    observed = telemetry.set_up(settings, instance, __version__)
    try:
        async with running(settings, observed.registry) as kvstore:
            await run_until_signal(kvstore.server, kvstore.drain, settings.drain_timeout_s)
    except* FailedPrecondition as group:
        raise group.exceptions[0] from None
    finally:
        observed.close()


async def migrated(settings: Settings) -> str:
    """Bring the cluster's keys to this schema; returns what was done. Raises `OmniError` where that is refused."""
    client = library_client(settings.redis_url or _DEFAULT_URL, **_connection(settings))
    try:
        return await migrate(client, settings.cluster, settings.lease_s)
    except RedisError as error:
        raise Unavailable(f"Redis cannot be reached: {type(error).__name__}", reason="redis_unreachable") from error
    finally:
        await client.aclose()


async def _announce(settings: Settings, server: Server, replica: Replica) -> None:
    await replica.answered_once.wait()
    await server.set_serving(True)
    log.info("serving", extra={"address": f"{settings.host}:{server.port}", "port": server.port})


def _connection(settings: Settings) -> dict[str, Any]:
    return {
        "is_cluster": settings.redis_cluster,
        "timeout_s": settings.redis_timeout_s,
        "connections": settings.redis_connections,
    }


def _store(settings: Settings, url: str, metrics: Metrics) -> RedisStore:
    limits = Limits(
        lease_ms=round(settings.lease_s * 1000),
        block_ttl_ms=round(settings.block_ttl_s * 1000),
        max_events=settings.max_events,
        max_blocks_per_worker=settings.max_blocks_per_worker,
        max_entries=settings.max_entries,
    )
    return RedisStore(connect(url, **_connection(settings)), settings.cluster, limits, metrics)


def _replica(settings: Settings, store: RedisStore, feed: Feed, metrics: Metrics) -> Replica:
    return Replica(
        store,
        feed,
        Leases(settings.lease_s),
        metrics,
        max_workers=settings.max_workers,
        memory_blocks=settings.memory_blocks,
        reconcile_s=settings.reconcile_s,
        wait_s=min(settings.redis_timeout_s / 2, settings.reconcile_s, _LONGEST_WAIT_S),
    )
