"""A vLLM attention backend whose steps run over sink and recent blocks, made from the backend a layer has."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata, subclass_attention_backend

from omni_kernels.vllm.omni_attn.kv_blocks import SinkRecentSpec
from omni_kernels.vllm.omni_attn.rows import sink_recent_rows

PromptLens = Callable[[], Tensor]
"""Prompt lengths of the step's sequences in their order, int32."""


@functools.cache
def sink_recent_backend(underlying: type[AttentionBackend], prompt_lens: PromptLens) -> type[AttentionBackend]:
    """As vLLM does for chunked local attention: only the metadata's builder differs, kernel and cache are the same."""

    class Builder(underlying.get_builder_cls()):  # type: ignore[misc]
        kv_cache_spec: SinkRecentSpec

        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
        ) -> Any:
            spec = self.kv_cache_spec
            rows = sink_recent_rows(
                common_attn_metadata.query_start_loc,
                common_attn_metadata.seq_lens,
                prompt_lens()[: common_attn_metadata.num_reqs],
                common_attn_metadata.block_table_tensor,
                spec.sink_blocks,
                spec.recent_blocks,
                spec.block_size,
            )
            step = common_attn_metadata.replace(
                query_start_loc=rows.query_start,
                query_start_loc_cpu=rows.query_start,
                seq_lens=rows.seq_lens,
                seq_lens_cpu_upper_bound=rows.seq_lens,
                block_table_tensor=rows.block_table,
                num_reqs=len(rows.seq_lens),
                max_query_len=rows.max_query_len,
                max_seq_len=rows.max_seq_len,
            )
            return super().build(common_prefix_len, step, fast_build)

    made: type[AttentionBackend] = subclass_attention_backend("SinkRecent", underlying, Builder)
    return made
