"""vLLM's CPU worker with an attention pattern (`worker_cls`): layers get their descriptions and backends after loading.

The pattern travels in vLLM's `additional_config`, under `ADDITIONAL`.
"""

from typing import Any

from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as
from vllm.v1.worker.cpu_worker import CPUWorker

from omni_kernels.patterns.pattern import Budget, Pattern
from omni_kernels.vllm.omni_attn.backend import sink_recent_backend
from omni_kernels.vllm.omni_attn.kv_blocks import SinkRecentSpec

ADDITIONAL = "omni_attention_pattern"


class CpuPatternWorker(CPUWorker):  # type: ignore[misc]
    """Raises ValueError while loading where the pattern does not fit the model."""

    def load_model(self, *arguments: Any, **named: Any) -> None:
        super().load_model(*arguments, **named)
        self._budgets = _budgets(self.vllm_config)
        layers = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)
        for name in self._budgets:
            layers[name].attn_backend = sink_recent_backend(layers[name].attn_backend, self._prompt_lens)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        specs: dict[str, KVCacheSpec] = super().get_kv_cache_spec()
        for name, budget in self._budgets.items():
            specs[name] = _sink_recent(specs[name], budget)
        return specs

    def _prompt_lens(self) -> Tensor:
        lens: Tensor = self.model_runner.input_batch.num_prompt_tokens_cpu_tensor
        return lens


def _budgets(vllm_config: Any) -> dict[str, Budget]:
    """Layer name -> budget, of the layers that do not keep everything. Layers of a drafter keep everything."""
    pattern = Pattern.from_json(vllm_config.additional_config[ADDITIONAL])
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    indices = {name: extract_layer_index(name) for name in layers}
    expected = vllm_config.model_config.hf_text_config.num_hidden_layers
    if len(pattern.layers) != expected:
        raise ValueError(f"attention pattern of {len(pattern.layers)} layers for a model of {expected}")
    chosen = {name: pattern.layers[n] for name, n in indices.items() if n < expected and pattern.layers[n]}
    for name in chosen:
        if type(layers[name]) is not Attention or layers[name].sliding_window is not None:
            raise ValueError(f"attention pattern: {name} is not a layer of plain full attention")
    return {name: budget for name, budget in chosen.items() if budget is not None}


def _sink_recent(spec: KVCacheSpec, budget: Budget) -> SinkRecentSpec:
    described: SinkRecentSpec = replace_as(
        spec,
        SinkRecentSpec,
        drop=set(FullAttentionSpec.__dataclass_fields__) - set(SinkRecentSpec.__dataclass_fields__),
        sink_blocks=budget.sink_blocks,
        recent_blocks=budget.recent_blocks,
    )
    return described
