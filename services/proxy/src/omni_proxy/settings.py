"""Settings of the proxy: `OMNI_PROXY_<FIELD>`."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from omni_common.addresses import checked_address
from omni_common.settings import ServiceSettings
from omni_proxy.health import HealthSettings
from omni_proxy.hedging import HedgingSettings
from omni_proxy.scheduling.policies import policies


class Settings(ServiceSettings):
    service: ClassVar[str] = "proxy"

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    proxy_id: str = Field("", description="Name shown to workers; empty: made from host name and process id")
    model_dir: Path = Field(description="Directory with tokenizer.json, tokenizer_config.json, config.json")
    served_model_name: str = Field("", description="Empty: the name of model_dir")
    model_aliases: tuple[str, ...] = Field((), description="Other names clients may ask for")
    output_format: Literal["auto", "plain", "hermes", "qwen3", "deepseek", "pangu"] = Field(
        "auto", description="How the model writes reasoning and tool calls; auto: as its chat template shows"
    )
    generation_defaults: Literal["model", "none"] = Field(
        "model", description="Take temperature, top_p, top_k, ... defaults from generation_config.json or not"
    )
    kvstore: tuple[str, ...] = Field(
        (), description="host:port of the kvstore whose members are used; several, with commas, are tried in turn"
    )
    workers: tuple[str, ...] = Field(
        (), validate_default=True, description="host:port of workers that are always members; several, with commas"
    )

    scheduler_config: Path | None = Field(
        None, description="YAML file of policy, queue, tenants, ...; read again when it changes"
    )
    policy: str = "cost"
    disaggregate_min_tokens: int = Field(0, ge=0, description="Uncached prompt tokens from which prefill is apart")
    index_blocks: int = Field(4_194_304, ge=1, description="Blocks the prefix index holds; the least used go first")
    expected_ttl_s: float = Field(
        2.0, gt=0, description="How long a computed prompt counts as cached before the worker's own word arrives"
    )
    key_cache_bytes: int = Field(64 * 1024 * 1024, ge=0, description="Memory for block keys of earlier prompts")
    # A block of 16 tokens of an 8B model is about 2 MiB; over 20 GB/s, 3 GB/s and 12 Gb/s.
    host_ms_per_block: float = Field(0.1, ge=0, description="Loading a block from the worker's own host memory")
    disk_ms_per_block: float = Field(0.7, ge=0, description="Loading a block from the worker's own disk")
    remote_ms_per_block: float = Field(1.4, ge=0, description="Loading a block the worker keeps elsewhere")

    health: HealthSettings = Field(
        HealthSettings.model_validate({}), description="When a sick worker is left alone, and how it returns"
    )
    hedging: HedgingSettings = Field(
        HedgingSettings.model_validate({}), description="Second prefills beside those that take too long"
    )
    request_timeout_s: float = Field(600.0, gt=0)
    resume_timeout_s: float = Field(
        10.0, ge=0, description="How long a sequence waits for a decode worker to resume on"
    )
    connect_timeout_s: float = Field(5.0, gt=0, description="Limit of opening a session or describing a worker")
    max_attempts: int = Field(4, ge=1, description="Legs of one kind a sequence may try")
    max_body_bytes: int = Field(8 * 1024 * 1024, ge=1)
    body_timeout_s: float = Field(30.0, gt=0, description="Limit of receiving a request body")
    max_inflight: int = Field(8192, ge=1, description="Sequences held back and in flight; more are answered 429")
    max_sequences_per_request: int = Field(128, ge=1, description="prompts x n of one request")
    stats_interval_ms: int = Field(50, ge=1)

    @field_validator("kvstore", "workers", mode="before")
    @classmethod
    def _separate(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        if not isinstance(value, list | tuple | None):
            raise ValueError("write host:port, several with commas")
        return value or ()

    @field_validator("kvstore", "workers")
    @classmethod
    def _addresses(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(checked_address, given))

    @field_validator("workers")
    @classmethod
    def _finds_workers(cls, given: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not given and info.data.get("kvstore") == ():
            raise ValueError("no worker could ever be found: set OMNI_PROXY_KVSTORE or OMNI_PROXY_WORKERS")
        return given

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, name: str) -> str:
        if name not in policies():
            raise ValueError(f"unknown policy {name!r}; known: {', '.join(sorted(policies()))}")
        return name

    @property
    def model(self) -> str:
        """The name clients and workers know the model by."""
        return self.served_model_name or self.model_dir.resolve().name
