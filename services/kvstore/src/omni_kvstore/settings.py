"""Settings of the kvstore service, `OMNI_KVSTORE_*`."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator
from redis.asyncio.connection import parse_url

from omni_common.settings import ServiceSettings


class Settings(ServiceSettings):
    service: ClassVar[str] = "kvstore"

    host: str = Field("127.0.0.1", description="Address the gRPC server listens on")
    port: int = Field(50061, ge=0, le=65535, description="0 picks a free one")
    redis_url: str | None = Field(None, description="redis://, rediss:// or unix://; default redis://127.0.0.1:6379/0")
    redis_cluster: bool = Field(False, description="redis_url names a node of a Redis Cluster")
    embedded_redis_dir: Path | None = Field(
        None, description="Without redis_url: run a Redis server of our own, with its data here"
    )
    cluster: str = Field("default", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Separates fleets on one Redis")
    lease_s: float = Field(5.0, gt=0, le=3600, description="Membership ends this long after the last heartbeat")
    block_ttl_s: float = Field(86_400.0, gt=0, description="Bound of an entry's life; renewed at half of it")
    redis_timeout_s: float = Field(2.0, gt=0, description="Bound of one Redis operation")
    redis_connections: int = Field(32, ge=4)
    reconcile_s: float = Field(10.0, gt=0, description="How often memory is compared with Redis")
    max_events: int = Field(4096, ge=256, description="About how many changes Redis keeps for replicas that lag")
    max_blocks_per_worker: int = Field(4_000_000, ge=1, description="Above it a worker's deepest blocks are forgotten")
    max_entries: int = Field(20_000_000, ge=1, description="(block, worker) entries in Redis; publishers make room")
    memory_blocks: int = Field(10_000_000, ge=1, description="Blocks this replica remembers; least used go first")
    max_workers: int = Field(4096, ge=1)
    max_lookup_blocks: int = Field(16_384, ge=1)
    watch_queue: int = Field(4096, ge=1, description="Changes queued per watch before it gets a new snapshot")

    @field_validator("redis_url")
    @classmethod
    def _can_be_read(cls, url: str | None) -> str | None:
        if url is not None:
            parse_url(url)
        return url
