"""Settings of the placement service, `OMNI_PLACEMENT_*`."""

from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from omni_common.settings import ServiceSettings
from omni_placement.economy import Costs, Rule
from omni_placement.layout import Topology
from omni_placement.load import LoadRules, Smoothing
from omni_placement.planning import Rules
from omni_placement.solvers import SOLVERS

_SMOOTHING, _RULE, _COSTS = Smoothing(), Rule(), Costs(ms_per_token=0.0005)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TopologySettings(_Part):
    """Shape of one model's expert parallelism; checked as a whole when the service starts."""

    num_layers: int = Field(ge=1)
    num_experts: int = Field(ge=1)
    num_ranks: int = Field(ge=1)
    slots_per_rank: int = Field(ge=1)
    ranks_per_host: int = Field(0, ge=0)
    rank_slots: tuple[int, ...] = ()
    shared_ranks: tuple[int, ...] = ()
    num_groups: int = Field(1, ge=1)
    expert_bytes: int = Field(0, ge=0)

    @property
    def topology(self) -> Topology:
        """Raises `InvalidRequest` where the parts contradict each other or the experts do not fit."""
        return Topology(**self.model_dump())


class ForecastSettings(_Part):
    interval_s: float = Field(default=_SMOOTHING.interval_s, gt=0, description="Reports are added up over so long")
    horizon_s: float = Field(
        default=_SMOOTHING.horizon_s, gt=0, description="Plans are made, and gains counted, for so long ahead"
    )
    max_age_s: float = Field(default=300.0, gt=0, description="Groups with no newer report are left alone")


class EconomySettings(_Part):
    """When a layout is worth its migration."""

    ms_per_token: float = Field(
        default=_COSTS.ms_per_token,
        gt=0,
        description="Step time per token on a layer's slowest rank, where reports do not tell it",
    )
    bandwidth_bytes_per_s: float = Field(
        default=_COSTS.bandwidth_bytes_per_s, gt=0, description="Of one rank, sending and receiving at once"
    )
    stall_ms_per_round: float = Field(default=_COSTS.stall_ms_per_round, ge=0)
    exposed: float = Field(
        default=_COSTS.exposed, ge=0, le=1, description="Share of a transfer's time by which steps take longer"
    )
    hysteresis: float = Field(
        default=_RULE.hysteresis, ge=0, description="The gain must exceed the cost by so many times the cost"
    )
    least_gain: float = Field(
        default=_RULE.least_gain, ge=0, le=1, description="And be this share of the time on slowest ranks"
    )
    risk: float = Field(default=_RULE.risk, ge=0, description="Standard deviations of a gain held against it")
    min_interval_s: float = Field(default=_RULE.min_interval_s, ge=0, description="Between two layouts of a group")
    waits_out_bursts: bool = _RULE.waits_out_bursts


class Settings(ServiceSettings):
    service: ClassVar[str] = "placement"

    host: str = Field("127.0.0.1", description="Address the gRPC server listens on")
    port: int = Field(50062, ge=0, le=65535, description="0 picks a free one")
    state_dir: Path | None = Field(None, description="Layouts and load are kept here; else they end with the process")
    models: dict[str, TopologySettings] = Field(
        default_factory=dict, description="Models whose identity layout is in force from the start"
    )
    default_solver: str = "omni"
    replica_budget: int | None = Field(
        None, ge=0, description="Copies beyond one per expert, over all layers, in the service's own plans"
    )
    rebalance_interval_s: float = Field(30.0, ge=0, description="Between two looks at every group; 0 looks at none")
    round_timeout_s: float = Field(90.0, gt=0, description="A migration of which nothing is heard for so long failed")
    history: int = Field(16, ge=2, description="Layouts kept per group")
    load_windows: int = Field(64, ge=1, description="Reports kept per group, phase and traffic class")
    max_groups: int = Field(64, ge=1)
    forget_after_s: float = Field(
        3600.0, ge=0, description="A group whose worker is away for so long makes room for another one"
    )
    watch_queue: int = Field(16, ge=1, description="Layouts queued per watch before older versions are skipped")
    forecast: ForecastSettings = ForecastSettings()
    economy: EconomySettings = EconomySettings()

    @field_validator("default_solver")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in SOLVERS:
            raise ValueError(f"no solver {name!r}; there are {', '.join(SOLVERS)}")
        return name

    @property
    def load_rules(self) -> LoadRules:
        smoothing = Smoothing(interval_s=self.forecast.interval_s, horizon_s=self.forecast.horizon_s)
        return LoadRules(windows=self.load_windows, groups=self.max_groups, smoothing=smoothing)

    @property
    def plan_rules(self) -> Rules:
        own = self.economy
        rule = Rule(
            hysteresis=own.hysteresis,
            least_gain=own.least_gain,
            risk=own.risk,
            min_interval_s=own.min_interval_s,
            waits_out_bursts=own.waits_out_bursts,
        )
        costs = Costs(
            ms_per_token=own.ms_per_token,
            bandwidth_bytes_per_s=own.bandwidth_bytes_per_s,
            stall_ms_per_round=own.stall_ms_per_round,
            exposed=own.exposed,
        )
        return Rules(self.default_solver, self.forecast.horizon_s, self.replica_budget, costs, rule)
