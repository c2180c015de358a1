"""Scores of the lightning indexer (DeepSeek-AI, 2025), and its best positions by torch.topk.

A score and its position make one whole number that orders as asked: higher scores first, then lower positions. So equal
scores need no stable sort, and the result does not depend on the device.

On Ascend: whether torch.topk takes int64 there is not known to us. Not run on Ascend.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from omni_kernels.backends.triton.language import dot, on, power_of_two
from omni_kernels.backends.triton.mla import sequence_of_token

_SCRATCH_BYTES = 256 << 20
_NOWHERE = tl.constexpr(-(2**63))


@triton.jit
def _score(
    q, weights, cache, table, query_start, seq_lens, ranks,
    first_token, num_seqs, table_width, block_size, heads, width, cache_block, cache_slot,
    D: tl.constexpr, IN_BLOCK: tl.constexpr, SEQS: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
    D_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    token = first_token + row
    seq = tl.minimum(sequence_of_token(query_start, token, num_seqs, SEQS), num_seqs - 1)
    visible = tl.load(seq_lens + seq) - tl.load(query_start + seq + 1) + token + 1
    start = tl.program_id(1) * TILE
    columns = start + tl.arange(0, TILE)
    is_column = columns < visible
    h = tl.arange(0, HEADS)
    d = tl.arange(0, D_BLOCK)
    query = tl.load(
        q + (token.to(tl.int64) * heads + h)[:, None] * D + d[None, :],
        mask=(h < heads)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    weight = tl.load(weights + token * heads + h, mask=h < heads, other=0.0)
    if IN_BLOCK:
        # Tiles behind the sequence read its first block, and leave nothing.
        block = tl.load(table + seq * table_width + tl.where(start < visible, start // block_size, 0)).to(tl.int64)
    else:
        block = tl.load(table + seq * table_width + columns // block_size, mask=is_column, other=0).to(tl.int64)
    at = block * cache_block + (columns % block_size) * cache_slot
    key = tl.load(cache + at[None, :] + d[:, None], mask=is_column[None, :] & (d < D)[:, None], other=0.0)
    products = dot(query, key, tl.zeros((HEADS, TILE), tl.float32))
    score = tl.sum(tl.maximum(products, 0.0) * weight[:, None], axis=0)
    score = tl.where(score == 0.0, 0.0, score)  # 0 and -0 are equal
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    rank = (ordered << 32) | (0xFFFFFFFF - columns.to(tl.int64))
    rank = tl.where(is_column, rank, _NOWHERE)
    tl.store(ranks + row.to(tl.int64) * width + columns, rank, mask=columns < width)


def indexer_top_k(
    q: Tensor,
    weights: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    top_k: int,
) -> Tensor:
    tokens, heads, width = q.shape
    block_size = key_cache.shape[1]
    num_seqs, table_width = block_table.shape
    out = torch.full((tokens, top_k), -1, dtype=torch.int32, device=q.device)
    num_keys = table_width * block_size
    if tokens == 0 or num_keys == 0:
        return out
    tile = 64
    tables = on(q.device, block_table, query_start, seq_lens)
    step = max(_SCRATCH_BYTES // (8 * num_keys), 1)
    for first in range(0, tokens, step):
        count = min(step, tokens - first)
        ranks = torch.empty(count, num_keys, dtype=torch.int64, device=q.device)
        _score[(count, triton.cdiv(num_keys, tile))](
            q, weights, key_cache, *tables, ranks,
            first, num_seqs, table_width, block_size, heads, num_keys, *key_cache.stride()[:2],
            D=width, IN_BLOCK=block_size % tile == 0, SEQS=power_of_two(num_seqs), HEADS=power_of_two(heads, 16),
            TILE=tile, D_BLOCK=power_of_two(width, 16),
        )  # fmt: skip
        best = torch.topk(ranks, min(top_k, num_keys), dim=1).values
        positions = 0xFFFFFFFF - (best & 0xFFFFFFFF)
        out[first : first + count, : best.shape[1]] = torch.where(best == _NOWHERE.value, -1, positions).to(torch.int32)
    return out


KERNELS: Mapping[str, Callable[..., Any]] = {"indexer_top_k": indexer_top_k}
