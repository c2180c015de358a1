"""Settings of the placement service, `OMNI_PLACEMENT_*`."""

from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from omni_common.settings import ServiceSettings
from omni_placement.solvers import SOLVERS


class TopologySettings(BaseModel):
    """Shape of one model's expert parallelism; checked as a whole when the service starts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_layers: int = Field(ge=1)
    num_experts: int = Field(ge=1)
    num_ranks: int = Field(ge=1)
    slots_per_rank: int = Field(ge=1)


class Settings(ServiceSettings):
    service: ClassVar[str] = "placement"

    host: str = Field("127.0.0.1", description="Address the gRPC server listens on")
    port: int = Field(50062, ge=0, le=65535, description="0 picks a free one")
    state_dir: Path | None = Field(None, description="Layouts are kept here; without it they end with the process")
    models: dict[str, TopologySettings] = Field(
        default_factory=dict, description="Models whose identity layout is in force from the start"
    )
    default_solver: str = "identity"
    load_windows: int = Field(64, ge=1, description="Reports kept per model")
    max_models: int = Field(64, ge=1)
    watch_queue: int = Field(16, ge=1, description="Layouts queued per watch before older versions are skipped")

    @field_validator("default_solver")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in SOLVERS:
            raise ValueError(f"no solver {name!r}; there are {', '.join(SOLVERS)}")
        return name
