"""The Redis client: one server, or a Redis Cluster, behind the few calls the store makes."""

import hashlib
from dataclasses import dataclass
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff


@dataclass(frozen=True, slots=True)
class Source:
    """A script and the name Redis knows it by."""

    text: str
    sha: str

    @staticmethod
    def of(text: str) -> "Source":
        return Source(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


class RedisClient:
    """One server. Scripts take one key, which places them on a node of a cluster."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def evalsha(self, sha: str, key: str, *arguments: Any) -> Any:
        return await self._client.evalsha(sha, 1, key, *arguments)

    async def eval(self, text: str, key: str, *arguments: Any) -> Any:
        return await self._client.eval(text, 1, key, *arguments)

    async def xread(self, streams: dict[str, str], count: int, block: int) -> Any:
        return await self._client.xread(streams, count=count, block=block)

    async def xrange(self, name: str, first: str, last: str, count: int) -> Any:
        return await self._client.xrange(name, first, last, count=count)

    async def used_bytes(self, key: str) -> int:
        info = await self._client.info("memory")
        return int(info["used_memory"])

    async def close(self) -> None:
        await self._client.aclose()


class _Cluster(RedisClient):
    async def used_bytes(self, key: str) -> int:
        node = self._client.get_node_from_key(key)
        info = await self._client.info("memory", target_nodes=node)
        return int(info["used_memory"])


def library_client(url: str, *, is_cluster: bool, timeout_s: float, connections: int) -> Any:
    """The library's own client with bounded waits; one retry covers connections that died while pooled."""
    options: dict[str, Any] = {
        "max_connections": connections,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 1),
        "protocol": 2,
    }
    if is_cluster:
        return RedisCluster.from_url(url, **options)
    return Redis.from_pool(BlockingConnectionPool.from_url(url, timeout=timeout_s, **options))


def connect(url: str, *, is_cluster: bool, timeout_s: float, connections: int) -> RedisClient:
    """The store's client. Of a cluster the URL names any one node."""
    client = library_client(url, is_cluster=is_cluster, timeout_s=timeout_s, connections=connections)
    return _Cluster(client) if is_cluster else RedisClient(client)
