"""The lightning indexer on Ascend."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch_npu
from torch import Tensor

from omni_kernels.backends.npu.fused_attention import check_contiguous
from omni_kernels.checks import unsupported

_COUNTS = frozenset(range(1, 2049)) | {3072, 4096, 5120, 6144, 7168, 8192}


def _indexer_top_k(
    q: Tensor,
    weights: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    top_k: int,
) -> Tensor:
    """The call takes weights in the dtype of `q`, so scores are rounded more; which of two equal scores goes first is
    not documented."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        unsupported("q", "dtype must be bfloat16 or float16", q.dtype)
    if q.shape[2] != 128:
        unsupported("q", "head size must be 128", q.shape[2])
    if q.shape[1] > 64:
        unsupported("q", "heads must be at most 64", q.shape[1])
    if top_k not in _COUNTS:
        unsupported("top_k", "must be up to 2048, or a multiple of 1024 up to 8192", top_k)
    if key_cache.shape[1] % 16:
        unsupported("key_cache", "block size must be a multiple of 16", key_cache.shape[1])
    check_contiguous("key_cache", key_cache)
    if q.shape[0] == 0:
        return q.new_empty((0, top_k), dtype=torch.int32)
    positions: Tensor = torch_npu.npu_lightning_indexer(
        q,
        key_cache.unsqueeze(2),
        weights.to(q.dtype),
        actual_seq_lengths_query=query_start[1:].to(q.device),
        actual_seq_lengths_key=seq_lens.to(q.device),
        block_table=block_table,
        layout_query="TND",
        layout_key="PA_BSND",
        sparse_count=top_k,
        sparse_mode=3,
    )[0]
    return positions.squeeze(1)


KERNELS: Mapping[str, Callable[..., Any]] = {"indexer_top_k": _indexer_top_k}
