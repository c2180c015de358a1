"""Settings of the simulated engine."""

import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from omni_common.errors import InvalidRequest

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class Timing(BaseModel):
    """Coefficients in milliseconds; the defaults resemble the tiny model on two CPU cores."""

    model_config = _FROZEN

    prefill_base_ms: float = Field(4.0, ge=0, description="a")
    prefill_token_ms: float = Field(0.06, ge=0, description="b, per uncached prompt token")
    prefill_context_ms: float = Field(2e-6, ge=0, description="c, per uncached prompt token and token of context")
    step_base_ms: float = Field(5.0, ge=0, description="d")
    step_sequence_ms: float = Field(0.25, ge=0, description="e, per running sequence")
    step_context_ms: float = Field(2e-4, ge=0, description="f, per token of context of all running sequences")
    transfer_latency_ms: float = Field(2.0, ge=0)
    transfer_gib_per_s: float = Field(1.0, gt=0)
    kv_bytes_per_token: int = Field(2048, ge=0)
    adapter_load_ms: float = Field(0.0, ge=0, description="A step lasts so much longer for each adapter brought in")

    def prefill_ms(self, new_tokens: int, context: int) -> float:
        """Without the base, which is paid once per step."""
        return self.prefill_token_ms * new_tokens + self.prefill_context_ms * new_tokens * context

    def step_ms(self, batch: int, total_context: int) -> float:
        return self.step_base_ms + self.step_sequence_ms * batch + self.step_context_ms * total_context

    def transfer_s(self, num_tokens: int) -> float:
        return self.transfer_latency_ms / 1e3 + num_tokens * self.kv_bytes_per_token / (self.transfer_gib_per_s * 2**30)


class Faults(BaseModel):
    """What goes wrong on purpose. Changeable while the engine runs."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    fail_next_prefills: int = Field(0, ge=0, description="So many of the next prefills fail with Unavailable")
    fail_pulls: float = Field(0.0, ge=0, le=1, description="Share of pulls that fail, chosen by request id")
    slow_factor: float = Field(1.0, gt=0, description="Every step and transfer lasts so many times longer")
    die_after_s: float | None = Field(None, ge=0, description="The engine dies so long after its start")
    drop_next_event_batches: int = Field(0, ge=0, description="So many of the next block event batches are lost")
    fail_next_moves: int = Field(0, ge=0, description="So many of the next rounds of expert moves fail")
    failed_ranks: tuple[int, ...] = Field((), description="Expert-parallel ranks that take part in no round")


class ExpertSettings(BaseModel):
    """Expert parallelism of the simulated model, and which experts its router prefers."""

    model_config = _FROZEN

    num_ranks: int = Field(0, ge=0, description="Expert-parallel ranks; 0: no expert parallelism")
    spare_slots: int = Field(0, ge=0, description="Slots per layer beyond one for each expert, over all ranks")
    ranks_per_host: int = Field(0, ge=0, description="0: all on one")
    seed: int = Field(0, ge=0, description="Of the router's preferences and draws")
    skew: float = Field(1.0, ge=0, description="Exponent of the experts' Zipf popularity; 0: all alike")
    classes: int = Field(1, ge=1, description="Classes of traffic, each with preferences of its own")
    drift_tokens: int = Field(0, ge=0, description="Tokens after which the preferences are others; 0: they stay")
    moe_share: float = Field(0.5, ge=0, le=1, description="Share of the expert layers in a step with even ranks")
    expert_bytes: int = Field(0, ge=0, description="Weights of one expert of one layer")
    copy_gib_per_s: float = Field(1.0, gt=0, description="Between two ranks, in each direction")
    switch_ms: float = Field(1.0, ge=0, description="Pause at the step boundary where a layout comes into force")


class SimSettings(BaseModel):
    """One simulated engine."""

    model_config = _FROZEN

    block_size: int = Field(16, ge=1)
    num_blocks: int = Field(4096, ge=1)
    max_model_len: int = Field(8192, ge=2)
    max_num_seqs: int = Field(64, ge=1)
    max_num_batched_tokens: int = Field(2048, ge=1)
    start_s: float = Field(0.0, ge=0, description="How long loading takes")
    seed: int = 0
    first_token_id: int = Field(260, ge=0, description="Generated tokens come from this id on")
    num_token_ids: int = Field(512, ge=1, description="So many different tokens are generated")
    eos_token_id: int | None = Field(None, ge=0, description="Default: the model's own, 2 without a model")
    mean_output_tokens: float = Field(128.0, gt=0, description="Mean of the exponential length before the end token")
    lease_s: float = Field(30.0, gt=0, description="How long a finished prefill's blocks wait to be pulled")
    pull_timeout_s: float = Field(5.0, gt=0, description="How long the holder of blocks may take to answer")
    kv_host: str = Field("127.0.0.1", description="Address other engines reach this one's leases by")
    weights: str = Field("", description="Name of the model's weights; blocks go between equal ones only")
    adapter_slots: int = Field(0, ge=0, description="Different adapters in one batch; 0: all that are served")
    fixed_role: str = Field("", description="Why the worker's role may not change; empty: it may")
    num_moe_layers: int = Field(4, ge=0)
    num_experts: int = Field(16, ge=0)
    experts_per_token: int = Field(4, ge=0)
    experts: ExpertSettings = ExpertSettings.model_validate({})
    timing: Timing = Timing.model_validate({})
    faults: Faults = Faults.model_validate({})

    @model_validator(mode="after")
    def _one_sequence_must_fit(self) -> Self:
        if self.num_blocks * self.block_size < self.max_model_len:
            raise ValueError("num_blocks * block_size must hold a sequence of max_model_len")
        return self

    @model_validator(mode="after")
    def _experts_must_fit(self) -> Self:
        ranks, slots = self.experts.num_ranks, self.num_experts + self.experts.spare_slots
        if not ranks:
            return self
        if not (self.num_moe_layers and 0 < self.experts_per_token <= self.num_experts):
            raise ValueError("expert parallelism needs num_moe_layers, and experts_per_token of num_experts")
        if slots % ranks or slots // ranks > self.num_experts:
            raise ValueError(
                f"num_experts + spare_slots ({slots}) must be a multiple of num_ranks ({ranks}), and a rank cannot "
                "hold an expert twice"
            )
        return self

    @property
    def expert_slots_per_rank(self) -> int:
        """Slots of each rank per layer; 0 without expert parallelism."""
        ranks = self.experts.num_ranks
        return (self.num_experts + self.experts.spare_slots) // ranks if ranks else 0

    def for_model(self, model_dir: Path | None) -> Self:
        """With the end token of the model's configuration, where none is set here.

        Raises InvalidRequest where config.json is there and no JSON object.
        """
        if self.eos_token_id is not None or model_dir is None:
            return self
        path = model_dir / "config.json"
        declared = _read_config(path).get("eos_token_id") if path.is_file() else None
        token = declared[0] if isinstance(declared, list) and declared else declared
        return self.model_copy(update={"eos_token_id": token}) if isinstance(token, int) else self


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"model_dir: {path} cannot be read: {error}", field="model_dir") from None
    if not isinstance(config, dict):
        raise InvalidRequest(f"model_dir: {path} must be a JSON object", field="model_dir")
    return config
