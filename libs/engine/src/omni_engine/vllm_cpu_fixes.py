"""Corrections of vLLM's CPU platform, made in the engine's own processes. Rows 11, 35 to 38, 40 and 41 of UPSTREAM.md.

`vllm_args` names those an engine needs in FIXES_VARIABLE; `plugin.py` calls `install` before the model is made.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FIXES_VARIABLE = "OMNI_ENGINE_CPU_FIXES"
LATENT_ROTARY = "latent_rotary"
INT8_EXPERTS = "int8_experts"
DRAFT_SAMPLING = "draft_sampling"
MEMORY_IN_PLACE = "memory_in_place"
SHORT_SPIN = "short_spin"
ADAPTERS_BESIDE_EXPERTS = "adapters_beside_experts"
ADAPTER_OPS = "adapter_ops"

# Core and worker of two engines: on fewer cores one that spins takes the time of one that computes.
_SPINNING_CORES = 4
# A worker waits less than this for its next step where the engine is busy.
_SPIN_S = 0.002

_MEMORY_NODES = Path("/sys/devices/system/node/has_memory")


def has_one_memory_node() -> bool:
    """False also where nothing says so."""
    return _MEMORY_NODES.is_file() and _MEMORY_NODES.read_text().strip().isdecimal()


def has_few_cores() -> bool:
    return len(os.sched_getaffinity(0)) < _SPINNING_CORES


def install(names: str) -> None:
    """`names` are separated by commas. Making a fix twice does nothing.

    Raises KeyError for one that is not known.
    """
    for name in filter(None, names.split(",")):
        _FIXES[name]()


def _fix_latent_rotary() -> None:
    """Rotate queries and keys of three dimensions (tokens, heads, width) by vLLM's own torch code.

    The CPU kernel takes the last stride but one as the distance between tokens. For (tokens, heads, width), which only
    latent attention passes, that is the distance between heads: it turns the wrong values, of other tokens too.
    """
    base = importlib.import_module("vllm.model_executor.layers.rotary_embedding.base")
    kernel = base.RotaryEmbedding.forward_cpu
    if getattr(kernel, "omni_fix", False):
        return

    def forward_cpu(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        if query.dim() == 3:
            return self.forward_native(positions, query, key)
        return kernel(self, positions, query, key)

    forward_cpu.omni_fix = True  # type: ignore[attr-defined]
    base.RotaryEmbedding.forward_cpu = forward_cpu


def _fix_draft_sampling() -> None:
    """Give every drafted token its request's temperature, top-k and top-p.

    vLLM's stand-in for the Triton kernel writes into an int64 copy of the output and drops it: drafted tokens of
    sampled requests are verified with whatever the memory held. And top-k alone fails, and ends the engine, in a step
    that has no drafted token to verify.
    """
    sampler: Any = importlib.import_module("vllm.v1.sample.rejection_sampler")
    sampler.expand_batch_to_tokens = expand_batch_to_tokens
    constrain = sampler.apply_sampling_constraints
    if getattr(constrain, "omni_fix", False):
        return

    def apply_sampling_constraints(logits: Any, *args: Any) -> Any:
        return constrain(logits, *args) if len(logits) else logits

    apply_sampling_constraints.omni_fix = True  # type: ignore[attr-defined]
    sampler.apply_sampling_constraints = apply_sampling_constraints


def expand_batch_to_tokens(
    x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Any:
    """x (requests,) once for each token of its request, in x's dtype: (num_tokens,); one value may be replaced.

    `cu_num_tokens` (requests,) are the running sums of the requests' tokens.
    """
    ends = cu_num_tokens.long()
    expanded = x.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)), output_size=num_tokens)
    return expanded.masked_fill(expanded == replace_from, replace_to) if replace_from != replace_to else expanded


def _keep_memory_in_place() -> None:
    """Bind and migrate no memory: for machines where all of it is on one node.

    vLLM's op asks the kernel to migrate the worker's pages to its node. Before it finds that they are there, the kernel
    waits for every core to drain its lists of pages, which a core kept busy by another worker may not do for minutes.
    """
    importlib.import_module("torch").ops._C.init_cpu_memory_env = lambda nodes: None


def _spin_briefly() -> None:
    """Wait for a message on its socket after two milliseconds, instead of after a second without one.

    Core and worker of an engine wait for each other's messages by spinning on the cores that others compute on. A step
    of an engine alone is a millisecond longer for it, and one beside another engine as much shorter.
    """
    queue: Any = importlib.import_module("vllm.distributed.device_communicators.shm_broadcast")
    queue.SpinCondition.__init__.__defaults__ = (_SPIN_S,)


def _add_int8_experts() -> None:
    importlib.import_module("omni_kernels.quantize.vllm_experts").install()


def _keep_expert_kernels() -> None:
    """Choose the kernels of experts as without adapters, for adapters that leave the experts alone.

    With adapters vLLM takes its Triton kernels for all experts, which a CPU has not: the first step ends the engine.
    """
    config: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.config").FusedMoEConfig
    made = config.__post_init__
    if getattr(made, "omni_fix", False):
        return

    def post_init(self: Any) -> None:
        made(self)
        self.is_lora_enabled = False

    post_init.omni_fix = True  # type: ignore[attr-defined]
    config.__post_init__ = post_init


def _add_adapter_ops() -> None:
    importlib.import_module("omni_engine.vllm_adapter_ops").install()


_FIXES: Mapping[str, Callable[[], None]] = {
    LATENT_ROTARY: _fix_latent_rotary,
    INT8_EXPERTS: _add_int8_experts,
    DRAFT_SAMPLING: _fix_draft_sampling,
    MEMORY_IN_PLACE: _keep_memory_in_place,
    SHORT_SPIN: _spin_briefly,
    ADAPTERS_BESIDE_EXPERTS: _keep_expert_kernels,
    ADAPTER_OPS: _add_adapter_ops,
}
