"""Paged attention with grouped heads on Ascend."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from omni_kernels.backends.npu.fused_attention import check_contiguous, check_grouped, check_sequences, grouped
from omni_kernels.checks import unsupported
from omni_kernels.ops.paging import spans


def _paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    check_grouped(q, key_cache, value_cache)
    check_contiguous("key_cache", key_cache)
    check_contiguous("value_cache", value_cache)
    pieces = spans(query_start, seq_lens)
    check_sequences(pieces)
    size = key_cache.shape[1]
    step = 16 if all(piece.last - piece.first == 1 for piece in pieces) else 128
    if size % step or size > 512:
        unsupported("key_cache", f"block size must be a multiple of {step} up to 512", size)
    if not pieces:
        return q.new_empty(q.shape)
    return grouped(q, key_cache, value_cache, block_table, pieces, scale)


KERNELS: Mapping[str, Callable[..., Any]] = {"paged_attention": _paged_attention}
