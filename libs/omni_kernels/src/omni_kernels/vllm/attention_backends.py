"""vLLM attention backends on `paged_attention`, `kv_write` and `mla_attention`. Imported where vLLM is."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl
from vllm.v1.kv_cache_layout import KVCacheLayout

from omni_kernels.ops import OPS
from omni_kernels.vllm.bound import bound

_ATTENTION = bound(OPS["paged_attention"])
_LATENT_ATTENTION = bound(OPS["mla_attention"])
_WRITE = bound(OPS["kv_write"])
_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(slots=True)
class Paging:
    """One step's batch as the ops take it: int32 but for `slots`, int64."""

    num_tokens: int
    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slots: Tensor


class PagingBuilder(AttentionMetadataBuilder[Paging]):  # type: ignore[misc]
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Paging:
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("kernels: attention: causal attention only")
        return Paging(
            common.num_actual_tokens,
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            common.slot_mapping,
        )


class OmniBackend(AttentionBackend):  # type: ignore[misc]
    """Full causal attention of decoders, with as many query heads per key head as the model has."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = _DTYPES
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "OMNI"

    @staticmethod
    def get_impl_cls() -> type["OmniAttention"]:
        return OmniAttention

    @staticmethod
    def get_builder_cls() -> type[PagingBuilder]:
        return PagingBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)


class OmniAttention(AttentionImpl[Paging]):  # type: ignore[misc]
    """Blocks are (heads, block size, key | value)."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        given = {
            "alibi slopes": alibi_slopes,
            "a sliding window": sliding_window,
            "a cap on logits": logits_soft_cap,
            "sinks": sinks,
            "an encoder": attn_type != AttentionType.DECODER,
            f"cache dtype {kv_cache_dtype}": kv_cache_dtype != "auto",
        }
        if unknown := [name for name, value in given.items() if value is not None and value is not False]:
            raise NotImplementedError(f"kernels: attention: {', '.join(unknown)} cannot be had")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Paging | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None:
            return output
        paging = attn_metadata
        tokens = paging.num_tokens
        keys, values = _split(kv_cache)
        output[:tokens] = _ATTENTION(
            query[:tokens].contiguous(),
            keys,
            values,
            paging.block_table,
            paging.query_start,
            paging.seq_lens,
            self.scale,
        )
        return output

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        keys, values = _split(kv_cache)
        _WRITE(key, value, keys, values, slot_mapping)


class OmniLatentBackend(CPUMLABackend):  # type: ignore[misc]
    @staticmethod
    def get_impl_cls() -> type["OmniLatentAttention"]:
        return OmniLatentAttention


class OmniLatentAttention(CPUMLAImpl):  # type: ignore[misc]
    """Decode in the absorbed form. Prompts are computed by vLLM, which expands their keys."""

    def forward_mqa(
        self, q: Tensor | tuple[Tensor, Tensor], kv_c_and_k_pe_cache: Tensor, attn_metadata: Any, layer: Any
    ) -> tuple[Tensor, Tensor | None]:
        decode = attn_metadata.decode
        latent, rope = q if isinstance(q, tuple) else q.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        attended = _LATENT_ATTENTION(
            latent.contiguous(),
            rope.contiguous(),
            kv_c_and_k_pe_cache,
            decode.block_table,
            _starts(len(decode.seq_lens), latent.device),
            decode.seq_lens,
            self.scale,
        )
        return attended, None


def _split(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, (blocks, block size, heads, head size) each, of a cache (blocks, heads, block size, both)."""
    by_token = kv_cache.transpose(1, 2)
    size = kv_cache.shape[-1] // 2
    return by_token[..., :size], by_token[..., size:]


def _starts(sequences: int, device: torch.device) -> Tensor:
    """Each sequence has one query row."""
    return torch.arange(sequences + 1, dtype=torch.int32, device=device)
