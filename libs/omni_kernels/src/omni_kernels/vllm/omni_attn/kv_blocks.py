"""KV blocks of layers that decode over their first and last blocks: vLLM's description and the owner of the blocks.

While a prompt is computed such a layer holds all of its blocks, as every other layer does. From the prompt's last
token on, only `sink_blocks` and `recent_blocks` are read, and the blocks between are given back to the pool:

    block      0        1        2        3        4        5
    prompt     [sink  ] [      ] [      ] [      ] [      ] [recent]
    decode     [sink  ]   free     free     free   [recent] [recent]     1 sink block, 2 recent blocks

A given-back block keeps its hash: until it is taken for something else, it serves prefix hits.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class SinkRecentSpec(AttentionSpec):  # type: ignore[misc]
    """A layer's KV cache; budgets in blocks.

    Not a kind of `FullAttentionSpec`: the NIXL connector would take failed pulls of single blocks to be reportable,
    and the scheduler dies of such a report where layers are in several groups.
    """

    sink_blocks: int
    recent_blocks: int

    def first_recent(self, num_tokens: int) -> int:
        """Number of the first recent block when the query is the last of `num_tokens`; may be below the sinks."""
        last: int = (num_tokens - 1) // self.block_size
        return last - self.recent_blocks + 1

    def keeps(self, block: int, num_tokens: int) -> bool:
        return block < self.sink_blocks or block >= self.first_recent(num_tokens)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """As full attention: the prompt is computed with all of its blocks."""
        page: int = self.page_size_bytes
        return page * int(cdiv(vllm_config.model_config.max_model_len, self.block_size))

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Layers of different budgets cannot share a block table."""
        return all(spec == self for spec in kv_cache_specs.values())


class SinkRecentManager(SingleTypeKVCacheManager):  # type: ignore[misc]
    """Blocks of one group of such layers."""

    kv_cache_spec: SinkRecentSpec

    def __init__(self, kv_cache_spec: SinkRecentSpec, **arguments: Any) -> None:
        super().__init__(kv_cache_spec, **arguments)
        self._prompt_tokens: dict[str, int] = {}

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Blocks without a gap from the start, as for full attention: the rest of the prompt attends to all of it."""
        size = kv_cache_spec.block_size
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        hits: list[list[KVCacheBlock]] = []
        for block_hash in itertools.islice(hashes, max_length // size):
            cached = block_pool.get_cached_block(block_hash, kv_cache_group_ids)
            if not cached:
                break
            hits.append(cached)
        if drop_eagle_block and hits:
            hits.pop()
        aligned = len(hits) * size // alignment_tokens * alignment_tokens
        del hits[aligned // size :]
        return tuple([cached[i] for cached in hits] for i in range(len(kv_cache_group_ids))), aligned

    def cache_blocks(
        self,
        request: Any,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Only blocks of tokens that attended to everything before them.

        Generated tokens did not, so what a later prompt would compute for the same tokens differs. Hits of groups
        intersect: this bound holds for the layers of full attention too.
        """
        prompt = request.num_prompt_tokens - 1
        super().cache_blocks(request, min(num_tokens, prompt), retention_interval, replay_boundaries=replay_boundaries)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Give back what the next query does not read; nothing before the prompt's last token is due.

        The block table lags by one token, so that what a finished prefill keeps is what a decode engine asks for.
        """
        if num_prompt_tokens is None:
            return
        self._prompt_tokens[request_id] = num_prompt_tokens
        if processed_computed_tokens >= num_prompt_tokens - 1:
            last = self.kv_cache_spec.first_recent(processed_computed_tokens)
            self._remove_blocks_in_range(request_id, self.kv_cache_spec.sink_blocks, last)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        *more: Any,
        **named: Any,
    ) -> int:
        """Less than for full attention where the prompt comes from another engine."""
        needed: int = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            *more,
            **named,
        )
        if total_computed_tokens == num_local_computed_tokens:
            return needed
        if total_computed_tokens < self._prompt_tokens.get(request_id, num_tokens) - 1:
            return needed
        held = len(new_computed_blocks) + len(self.req_to_blocks.get(request_id, ()))
        pulled = range(held, cdiv(total_computed_tokens, self.block_size))
        return needed - sum(not self.kv_cache_spec.keeps(block, total_computed_tokens) for block in pulled)

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        """Room for pulled tokens: for a whole prompt only the blocks that decode reads."""
        total = num_local_computed_tokens + num_external_computed_tokens
        if total < self._prompt_tokens[request_id] - 1:
            super().allocate_external_computed_blocks(
                request_id, num_local_computed_tokens, num_external_computed_tokens, record_for_zeroing
            )
            return
        blocks = self.req_to_blocks[request_id]
        pulled = range(len(blocks), cdiv(total, self.block_size))
        kept = [self.kv_cache_spec.keeps(block, total) for block in pulled]
        fresh = self.block_pool.get_new_blocks(sum(kept))
        if self.records_new_block_ids and record_for_zeroing:
            self.new_block_ids.extend(block.block_id for block in fresh)
        unused = iter(fresh)
        blocks.extend(next(unused) if is_kept else self._null_block for is_kept in kept)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._prompt_tokens.pop(request_id, None)
        popped: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return popped


def register() -> None:
    """Make the description known to vLLM. It fills its registry with its own kinds on first use and only if empty."""
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    KVCacheSpecRegistry.register(SinkRecentSpec, SinkRecentManager)


# Wherever a description arrives (it travels from workers to the scheduler by pickle), its manager must be known.
register()
