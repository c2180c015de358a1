"""Attention over a key and value cache in blocks (Kwon et al., 2023), heads in groups (Ainslie et al., 2023)."""

from collections.abc import Iterator

import torch
from torch import Tensor, device

from omni_kernels.case import DEEPSEEK_V3, QWEN3_MOE, TINY, Case, declare
from omni_kernels.checks import has_shape, is_positive, refuse
from omni_kernels.ops.paged_samples import LARGE, SMALL, case_name, normal, tolerances
from omni_kernels.ops.paging import attend, check_cache, check_paging, check_queries, gather, rows_at_a_time, spans


def _paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of q (T, Hq, D) over key_cache (N, B, Hkv, D) and value_cache (N, B, Hkv, Dv): (T, Hq, Dv).

    Prefill, prefill behind a prefix and decode in one batch: `paging` says whose rows and positions are which; query
    row i of a sequence sits at position seq_len - query_len + i and sees the positions up to its own. Keys of the rows
    themselves are in the cache already. Caches may be strided views, their last dimension contiguous.
    Computes in float32; the result has the dtype of `q`. Raises ValueError for what does not fit together.
    """
    out = q.new_empty(*q.shape[:2], value_cache.shape[-1])
    for span in spans(query_start, seq_lens):
        keys = gather(key_cache, block_table[span.row], 0, span.length)
        values = gather(value_cache, block_table[span.row], 0, span.length)
        positions = torch.arange(span.length, device=q.device)
        for piece in span.pieces(rows_at_a_time(q.shape[1], span.length)):
            seen = positions[: piece.length] <= positions[piece.start : piece.length].unsqueeze(1)
            rows = slice(piece.first, piece.last)
            out[rows] = attend(q[rows], keys[: piece.length], values[: piece.length], seen, scale)
    return out


def check_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> None:
    check_cache("key_cache", key_cache, 4)
    check_cache("value_cache", value_cache, 4)
    check_queries("q", q, "key_cache", key_cache)
    check_queries("q", q, "value_cache", value_cache)
    has_shape("value_cache", value_cache, (*key_cache.shape[:3], -1))
    has_shape("key_cache", key_cache, (-1, -1, -1, q.shape[2]))
    if key_cache.shape[2] == 0 or q.shape[1] % key_cache.shape[2]:
        refuse("q", f"heads must be a multiple of the {key_cache.shape[2]} of key_cache", q.shape[1])
    is_positive("scale", scale)
    check_paging(q.shape[0], key_cache, block_table, query_start, seq_lens)


def _fake(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    return q.new_empty(*q.shape[:2], value_cache.shape[-1])


def _samples(where: device) -> Iterator[Case]:
    """Grouped heads of Qwen3 (30B-A3B whole, 235B-A22B whole), and latent attention unabsorbed, of 16 of its heads."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    latent = DEEPSEEK_V3.head_dim + DEEPSEEK_V3.rope
    for name, heads, kv_heads, size, value_size, batches in (
        ("tiny", TINY.heads, TINY.kv_heads, TINY.head_dim, TINY.head_dim, SMALL),
        ("qwen3-30b-a3b", QWEN3_MOE.heads, QWEN3_MOE.kv_heads, QWEN3_MOE.head_dim, QWEN3_MOE.head_dim, LARGE),
        ("qwen3-235b-a22b", 64, 4, 128, 128, LARGE),
        ("deepseek-v3", 16, 16, latent, DEEPSEEK_V3.head_dim, LARGE),
    ):
        for batch in batches:
            paging = batch.paging(generator, where)
            blocks = (batch.num_blocks, batch.block_size, kv_heads)
            for dtype, atol, rtol in tolerances(batch):
                q = normal(generator, where, dtype, batch.tokens, heads, size)
                keys = normal(generator, where, dtype, *blocks, size)
                values = normal(generator, where, dtype, *blocks, value_size)
                inputs = (q, keys, values, *paging, size**-0.5)
                yield Case(case_name("paged_attention", name, batch, dtype), inputs, atol, rtol)


PAGED_ATTENTION = declare("paged_attention", _paged_attention, _fake, check_attention, _samples)
paged_attention = PAGED_ATTENTION.call

OPS = (PAGED_ATTENTION,)
