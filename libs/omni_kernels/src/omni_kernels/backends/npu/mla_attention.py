"""Latent attention on Ascend, full and sparse.

The fused calls read latents and rotated keys as two contiguous tensors, the ops hold them side by side: the blocks in
the table are copied apart first. An engine that keeps two caches, as vllm-ascend does, saves that copy.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch_npu
from torch import Tensor

from omni_kernels.backends.npu.fused_attention import check_sequences, ends_and_lengths, mask_for, table_of
from omni_kernels.checks import unsupported
from omni_kernels.ops.paging import spans

_RANK, _ROPE = 512, 64
_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
_ROWS = 16
"""Query rows of a sequence that the fused call takes; longer prompts go in pieces, each of its own length."""
_ABSORBED = 2


def _mla_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    _check(q_latent, q_rope)
    if cache.shape[1] not in (16, 128):
        unsupported("cache", "block size must be 16 or 128", cache.shape[1])
    pieces = [piece for span in spans(query_start, seq_lens) for piece in span.pieces(_ROWS)]
    check_sequences(pieces)
    if not pieces:
        return torch.empty_like(q_latent)
    latents, ropes, table = _apart(cache, block_table)
    mask, sparse_mode = mask_for(pieces, q_latent.device)
    ends, lengths = ends_and_lengths(pieces)
    attended: Tensor = torch_npu.npu_fused_infer_attention_score_v2(
        q_latent,
        latents.unsqueeze(1),
        latents.unsqueeze(1),
        query_rope=q_rope,
        key_rope=ropes.unsqueeze(1),
        atten_mask=mask,
        actual_seq_qlen=ends,
        actual_seq_kvlen=lengths,
        block_table=table_of(pieces, table),
        num_query_heads=q_latent.shape[1],
        num_key_value_heads=1,
        softmax_scale=scale,
        input_layout="TND",
        sparse_mode=sparse_mode,
        block_size=cache.shape[1],
    )[0]
    return attended


def _sparse_mla_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    positions: Tensor,
    scale: float,
) -> Tensor:
    _check(q_latent, q_rope)
    if cache.shape[1] % 16:
        unsupported("cache", "block size must be a multiple of 16", cache.shape[1])
    if q_latent.shape[0] == 0:
        return torch.empty_like(q_latent)
    latents, ropes, table = _apart(cache, block_table)
    attended: Tensor = torch_npu.npu_sparse_flash_attention(
        q_latent,
        latents.unsqueeze(2),
        latents.unsqueeze(2),
        positions.unsqueeze(1),
        scale,
        block_table=table,
        actual_seq_lengths_query=query_start[1:].to(q_latent.device),
        actual_seq_lengths_kv=seq_lens.to(q_latent.device),
        query_rope=q_rope,
        key_rope=ropes.unsqueeze(2),
        sparse_block_size=1,
        layout_query="TND",
        layout_kv="PA_BSND",
        sparse_mode=3,
        attention_mode=_ABSORBED,
    )[0]
    return attended


def _apart(cache: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (M, B, 512) and rotated keys (M, B, 64) of the blocks in the table, and the table that finds them."""
    named = block_table.clamp(0, cache.shape[0] - 1)
    blocks = cache.index_select(0, named.flatten())
    latents, ropes = blocks.split((_RANK, _ROPE), dim=-1)
    table = torch.arange(named.numel(), dtype=torch.int32, device=cache.device).view(named.shape)
    return latents.contiguous(), ropes.contiguous(), table


def _check(q_latent: Tensor, q_rope: Tensor) -> None:
    if q_latent.dtype not in (torch.bfloat16, torch.float16):
        unsupported("q_latent", "dtype must be bfloat16 or float16", q_latent.dtype)
    if q_latent.shape[2] != _RANK:
        unsupported("q_latent", f"rank must be {_RANK}", q_latent.shape[2])
    if q_rope.shape[2] != _ROPE:
        unsupported("q_rope", f"size must be {_ROPE}", q_rope.shape[2])
    if q_latent.shape[1] not in _HEADS:
        unsupported("q_latent", f"heads must be one of {_HEADS}", q_latent.shape[1])


KERNELS: Mapping[str, Callable[..., Any]] = {
    "mla_attention": _mla_attention,
    "sparse_mla_attention": _sparse_mla_attention,
}
