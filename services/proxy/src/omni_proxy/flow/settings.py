"""Bounds and strategies of the queue."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from omni_proxy.flow.fairness import FAIRNESS
from omni_proxy.flow.orders import known_orders
from omni_proxy.names import known_name


class BandSettings(BaseModel):
    """Requests of this priority, up to the next band's. A band goes before all bands of less priority."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    priority: int
    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")
    max_requests: int | None = Field(default=None, ge=1, description="None: only the common bound")
    max_bytes: int | None = Field(default=None, ge=1)
    hold_back: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the queue's bounds and of the workers' room left to higher bands"
    )
    order: str | None = Field(default=None, description="None: that of the queue")

    @field_validator("order")
    @classmethod
    def _known_order(cls, name: str | None) -> str | None:
        return None if name is None else known_name(name, known_orders())

    @property
    def is_sheddable(self) -> bool:
        return self.priority < 0


DEFAULT_BANDS = (
    BandSettings(priority=10, name="high"),
    BandSettings(priority=0, name="default"),
    BandSettings(priority=-10, name="sheddable", hold_back=0.3),
)


class FlowSettings(BaseModel):
    """The queue in front of the workers. Milliseconds and seconds as the names say."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_requests: int = Field(default=5000, ge=1, description="Waiting at once; more are answered 429")
    max_bytes: int = Field(default=256 * 1024 * 1024, ge=1, description="Of waiting prompts")
    max_tenant_requests: int = Field(default=1000, ge=1, description="The same for one tenant of a band")
    max_tenant_bytes: int = Field(default=64 * 1024 * 1024, ge=1)
    ttl_s: float = Field(default=60.0, gt=0, description="Longest wait")
    lookahead_ms: float = Field(
        default=20.0, ge=0, description="A worker has room when it has less work ahead than this"
    )
    max_hold_ms: float = Field(
        default=2000.0, gt=0, description="The head goes anyway when nothing could be released for so long"
    )
    worker_wait_ms: float = Field(
        default=1000.0,
        ge=0,
        description="From so long after the last worker has gone requests get 503 at once; who waits already gets it "
        "then, or after max_hold_ms if that is longer",
    )
    order: str = "slo"
    fairness: str = "least_attained_service"
    half_life_s: float = Field(
        default=30.0,
        gt=0,
        description="In which attained service counts half; below ttl_s, so that a credit ends in time",
    )
    shed_factor: float | None = Field(
        default=None, gt=0, description="Refuse at once what would wait longer than its TTFT SLO times this; None: wait"
    )
    sheddable_shed_factor: float | None = Field(default=1.0, gt=0, description="The same for priorities below 0")
    bands: tuple[BandSettings, ...] = Field(default=DEFAULT_BANDS, min_length=1)

    @field_validator("order")
    @classmethod
    def _known_order(cls, name: str) -> str:
        return known_name(name, known_orders())

    @field_validator("fairness")
    @classmethod
    def _known_fairness(cls, name: str) -> str:
        return known_name(name, FAIRNESS)

    @model_validator(mode="after")
    def _distinct_bands(self) -> Self:
        for what in ("priority", "name"):
            values = [getattr(band, what) for band in self.bands]
            if len(set(values)) < len(values):
                raise ValueError(f"bands: two have the same {what}")
        return self
