"""Settings of the vLLM engine. Imports nothing of vLLM, so that services can read them without it."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from omni_engine.vllm_speculation import Speculation
from omni_kernels.vllm.parts import parts_of

# Accepted by vLLM's CPU platform without a check, and wrong there: no error, wrong tokens.
WRONG_ON_CPU = frozenset({"int8_per_token_head", "int8_per_token", "fp8_per_token_head"})


class VllmSettings(BaseModel):
    """How one vLLM engine runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    platform: Literal["cpu", "cuda", "ascend", "twin"] = Field(
        "cpu", description="twin: a CPU that vLLM takes for an out-of-tree platform, as it takes Ascend; for tests"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    kv_cache_gib: float | None = Field(None, gt=0, description="Memory for KV blocks; on CPU the default is 1 GiB")
    kv_cache_dtype: str = "auto"
    block_size: int | None = Field(None, ge=1, description="Tokens per KV block; default is the platform's (CPU: 128)")
    max_model_len: int | None = Field(None, ge=1)
    max_num_seqs: int = Field(64, ge=1)
    max_num_batched_tokens: int = Field(4096, ge=1)
    tensor_parallel_size: int = Field(1, ge=1)
    data_parallel_size: int = Field(1, ge=1, description="Engine cores that share the experts, each with own sequences")
    expert_parallel: bool = Field(False, description="Spread whole experts over all ranks; their layout can be changed")
    redundant_experts: int = Field(
        0, ge=0, description="Spare expert slots per layer over all ranks, for second copies of busy experts"
    )
    adapter_slots: int | None = Field(
        None, ge=1, description="Different LoRA adapters in one batch; default: all that are served"
    )
    cores: str | None = Field(None, description="CPU cores of the engine's workers, e.g. '0-3' or '0-1|2-3' for two")
    enforce_eager: bool | None = Field(
        None, description="No torch.compile; default: only where no C++ compiler is found"
    )
    enable_prefix_caching: bool = True
    kv_connector: Literal["NixlConnector", ""] = "NixlConnector"
    any_role: bool = Field(
        False, description="Start the KV connector for both legs, so that the worker's role may change"
    )
    kv_host: str = Field("127.0.0.1", description="Address other engines reach the KV connector's side channel by")
    kv_port: int = Field(0, ge=0, le=65535, description="Side channel port; 0 picks a free one")
    kv_transports: str = Field("shm,cma,tcp,self", description="UCX transports; 'rc,tcp,self' or similar between hosts")
    kv_net_devices: str = Field("lo", description="UCX network devices; 'all' between hosts")
    kv_progress_interval_us: int = Field(
        500, ge=0, description="How long the KV connector's progress thread sleeps when idle; 0 spins on a core"
    )
    lease_s: int = Field(30, ge=6, description="How long a finished prefill's blocks wait to be pulled")
    kv_events: bool = True
    warmup_tokens: int = Field(200, ge=0, description="Length of the warm-up prompt; 0 skips the warm-up")
    start_timeout_s: float = Field(600.0, gt=0)
    weights: str = Field(
        "", description="Name of the model's weights; blocks go between equal ones only. Default: a digest of its files"
    )
    kernels: str = Field(
        "vllm", description="Whose ops the engine runs on: vllm, omni, or parts of it as in 'omni:norms,routing'"
    )
    attention_pattern: Path | None = Field(
        None, description="File of `omni attention search`: which layers decode over few KV blocks; one for all engines"
    )
    speculative: Speculation | None = Field(None, description="Draft tokens: 'mtp:2', 'ngram:3' or 'auto:2'; None: no")
    engine_args: dict[str, Any] = Field(default_factory=dict, description="More vLLM engine arguments, by their names")

    @model_validator(mode="after")
    def _refuse_wrong_cache_dtypes(self) -> Self:
        if self.on_cpu and self.kv_cache_dtype in WRONG_ON_CPU:
            raise ValueError(
                f"kv_cache_dtype {self.kv_cache_dtype!r} gives wrong tokens on CPU without an error; use auto or fp8"
            )
        return self

    @model_validator(mode="after")
    def _refuse_kernels_that_cannot_be(self) -> Self:
        parts = parts_of(self.kernels, self.platform)
        if "experts" in parts and self.data_parallel_size > 1:
            raise ValueError("kernels: data_parallel_size: our expert kernels have no part in gathering its tokens")
        if "attention" in parts and self.kv_cache_dtype != "auto":
            raise ValueError("kernels: attention: kv_cache_dtype must be auto")
        return self

    @property
    def on_cpu(self) -> bool:
        return self.platform in ("cpu", "twin")

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel_size * self.data_parallel_size

    @model_validator(mode="after")
    def _refuse_parallel_modes_that_cannot_be(self) -> Self:
        if self.expert_parallel and self.num_ranks < 2:
            raise ValueError("expert_parallel needs tensor_parallel_size or data_parallel_size of 2 or more")
        if self.redundant_experts and not self.expert_parallel:
            raise ValueError("redundant_experts are spare slots of expert_parallel, which is off")
        if self.data_parallel_size > 1 and not self.expert_parallel:
            raise ValueError("data_parallel_size without expert_parallel: start more workers instead")
        if self.data_parallel_size > 1 and (self.kv_connector or self.kv_events):
            raise ValueError(
                "data_parallel_size: each core has a KV cache of its own, which block events and pulls cannot tell "
                "apart; set kv_connector to '' and kv_events to false"
            )
        if self.expert_parallel and self.platform == "twin":
            raise ValueError("expert_parallel: the twin has one rank")
        if self.expert_parallel and self.platform == "ascend":
            raise ValueError("expert_parallel: layouts cannot be applied through vllm-ascend's own load balancer")
        if self.expert_parallel and self.platform == "cpu" and self.enforce_eager is False:
            raise ValueError("expert_parallel on CPU cannot be compiled: leave enforce_eager out")
        if self.expert_parallel and self.speculative:
            raise ValueError("speculative: expert layouts do not reach the experts of a drafter; leave one of them out")
        return self
