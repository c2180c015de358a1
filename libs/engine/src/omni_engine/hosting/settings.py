"""What every engine-hosting service can be told."""

import socket
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from omni_common.addresses import checked_address
from omni_common.settings import ServiceSettings
from omni_engine.adapters import checked_name
from omni_engine.sim.settings import SimSettings
from omni_engine.vllm_settings import VllmSettings

EngineRole = Literal["prefill", "decode", "both"]
Leg = Literal["prefill", "decode"]

GROUP_LABEL = "omni.group"
# The drafter of speculative decoding and its tokens, as chosen for the model: 'mtp:2'.
DRAFTER_LABEL = "omni.speculative"


class WorkerSettings(ServiceSettings):
    """Fields of a worker. A service derives, sets `service` and the role it takes by default."""

    worker_id: str = Field("", description="Unique in a cluster; default <service>-<hostname>-<port>")
    host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65535, description="gRPC port; 0 picks a free one")
    advertise_host: str = Field("", description="Host other services reach this worker by; default is `host`")
    role: EngineRole = "both"
    kvstore: str = Field("", description="host:port of the kvstore; empty: no membership and no block events")
    model_dir: Path | None = Field(None, description="Directory of the model; the simulated engine can do without")
    served_model_name: str = Field("", description="Default: the name of the model's directory")
    adapters: dict[str, Path] = Field(
        default_factory=dict, description="LoRA adapters served besides the model: name -> directory in PEFT's format"
    )
    engine: Literal["vllm", "sim"] = "vllm"
    vllm: VllmSettings = VllmSettings.model_validate({})
    sim: SimSettings = SimSettings.model_validate({})
    labels: dict[str, str] = Field(default_factory=dict, description="Published with the worker, e.g. host or rack")
    group: str = Field("", description="Prefill workers of a group serve its decode workers; empty: all of them")

    max_queued: int = Field(256, ge=0, description="Sequences and prefills accepted beyond max_num_seqs")
    frame_window: int = Field(64, ge=1, description="Frames sent before an acknowledgement is awaited")
    max_pending_tokens: int = Field(65_536, ge=1, description="Unsent tokens at which a session is ended")
    submit_timeout_s: float = Field(10.0, gt=0, description="How long the engine may take to accept a sequence")
    events_interval_s: float = Field(0.2, gt=0, description="Block events are published in batches this far apart")
    max_mirrored_blocks: int = Field(1_000_000, ge=1, description="Blocks whose keys are remembered for the kvstore")
    placement: str = Field("", description="host:port of the placement service; empty: experts stay where they are")
    expert_group: str = Field("", description="This engine's name among those of its model; default: the worker's")
    traffic_class: str = Field(
        "", description="Kind of traffic the worker serves, where expert load is told apart by it"
    )
    load_interval_s: float = Field(5.0, gt=0, description="Expert load is reported in windows of this length")
    move_timeout_s: float = Field(60.0, gt=0, description="How long the engine may take for one round of expert moves")

    @field_validator("kvstore", "placement")
    @classmethod
    def _is_address(cls, given: str) -> str:
        return given and checked_address(given)

    @field_validator("adapters", mode="before")
    @classmethod
    def _none_if_empty(cls, given: object) -> object:
        return {} if given is None else given  # what an empty variable reads as

    @field_validator("adapters")
    @classmethod
    def _have_names(cls, given: dict[str, Path], info: ValidationInfo) -> dict[str, Path]:
        model = _model_name(info.data.get("served_model_name", ""), info.data.get("model_dir"))
        if model in given:
            raise ValueError(f"{model!r} is the model's own name; give the adapter another")
        return {checked_name(name): given[name] for name in sorted(given)}

    @property
    def published_labels(self) -> dict[str, str]:
        """The labels, the group among them."""
        return {**self.labels, **({GROUP_LABEL: self.group} if self.group else {})}

    @property
    def model_name(self) -> str:
        """The name requests must carry."""
        return _model_name(self.served_model_name, self.model_dir)

    def name_at(self, port: int) -> str:
        """The worker's name once its port is known."""
        return self.worker_id or f"{self.service}-{socket.gethostname()}-{port}"

    def address_at(self, port: int) -> str:
        """Where other services reach the worker once its port is known."""
        host = self.advertise_host or self.host
        is_bare_ipv6 = ":" in host and not host.startswith("[")
        return f"[{host}]:{port}" if is_bare_ipv6 else f"{host}:{port}"


def _model_name(served: str, model_dir: Path | None) -> str:
    return served or (model_dir.resolve().name if model_dir else "sim")
