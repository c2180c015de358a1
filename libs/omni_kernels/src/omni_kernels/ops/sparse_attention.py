"""Sparse latent attention (DeepSeek-V3.2, 2025): a light indexer scores every token, attention reads the best ones."""

from collections.abc import Iterator

import torch
from torch import Generator, Tensor, device

from omni_kernels.case import DEEPSEEK_V3, TINY, Case, ModelShape, declare
from omni_kernels.checks import has_dtype, has_shape, is_contiguous, is_positive, on_device_of, refuse, wide
from omni_kernels.ops.mla_attention import check_latents
from omni_kernels.ops.paged_samples import LARGE, SMALL, Batch, case_name, normal, tolerances
from omni_kernels.ops.paging import check_cache, check_paging, check_queries, gather, known, rows_at_a_time, spans

_GATHERED = 1 << 24
"""Numbers of the cache a meaning holds at a time, beside the scores."""


def _indexer_top_k(
    q: Tensor,
    weights: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    top_k: int,
) -> Tensor:
    """The positions each query row should attend to, int32 (T, top_k): best first, ties lower first, -1 behind.

    The score of a position is the sum over heads of weights (T, Hi) * relu(q (T, Hi, Di) . key), keys in key_cache
    (N, B, Di). Rows and positions are those of `paged_attention`; a row at position t has min(t + 1, top_k) results.
    Computes in float32. Raises ValueError for what does not fit together.
    """
    out = torch.full((q.shape[0], top_k), -1, dtype=torch.int32, device=q.device)
    for span in spans(query_start, seq_lens):
        keys = wide(gather(key_cache, block_table[span.row], 0, span.length))
        best = min(top_k, span.length)
        for piece in span.pieces(rows_at_a_time(q.shape[1], span.length)):
            rows = slice(piece.first, piece.last)
            dots = torch.einsum("qhd,ld->qhl", wide(q[rows]), keys[: piece.length]).relu_()
            scores = torch.einsum("qhl,qh->ql", dots, weights[rows].to(dots.dtype))
            ahead = scores.new_ones(scores.shape, dtype=torch.bool).triu_(piece.start + 1)
            order = scores.masked_fill_(ahead, float("-inf")).argsort(dim=-1, descending=True, stable=True)[:, :best]
            counts = torch.arange(piece.start + 1, piece.length + 1, device=q.device).unsqueeze(1)
            valid = torch.arange(order.shape[1], device=q.device) < counts
            out[rows, : order.shape[1]] = order.where(valid, -1).int()
    return out


def _check_indexer(
    q: Tensor,
    weights: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    top_k: int,
) -> None:
    check_cache("key_cache", key_cache, 3)
    check_queries("q", q, "key_cache", key_cache)
    has_shape("key_cache", key_cache, (-1, -1, q.shape[2]))
    has_dtype("weights", weights, torch.float32)
    has_shape("weights", weights, q.shape[:2])
    is_contiguous("weights", weights)
    on_device_of("weights", weights, q)
    is_positive("top_k", top_k)
    check_paging(q.shape[0], key_cache, block_table, query_start, seq_lens)


def _fake_indexer(
    q: Tensor,
    weights: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    top_k: int,
) -> Tensor:
    return q.new_empty((q.shape[0], top_k), dtype=torch.int32)


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
    """`mla_attention` where each query row sees only the positions (T, top_k) int32 given for it: (T, H, R).

    A row of `positions` holds distinct positions up to the query's own, in any order and at least one, then -1.
    Computes in float32; the result has the dtype of `q_latent`. Raises ValueError for what does not fit together.
    """
    out = torch.empty_like(q_latent)
    size, rank = cache.shape[1], q_latent.shape[2]
    rows_at_once = max(1, _GATHERED // (positions.shape[1] * (cache.shape[2] + q_latent.shape[1])))
    for span in spans(query_start, seq_lens):
        for piece in span.pieces(rows_at_once):
            rows = slice(piece.first, piece.last)
            wanted = positions[rows]
            valid = wanted >= 0
            p = torch.where(valid, wanted, 0).long()
            keys = wide(cache[block_table[span.row].long()[p // size], p % size])
            q = wide(torch.cat((q_latent[rows], q_rope[rows]), -1))
            scores = torch.einsum("qhd,qkd->qhk", q, keys) * scale
            weights = scores.masked_fill_(~valid.unsqueeze(1), float("-inf")).softmax(-1)
            out[rows] = torch.einsum("qhk,qkr->qhr", weights, keys[..., :rank])
    return out


def _check_sparse_mla(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    positions: Tensor,
    scale: float,
) -> None:
    check_latents(q_latent, q_rope, cache, block_table, query_start, seq_lens, scale)
    has_dtype("positions", positions, torch.int32)
    has_shape("positions", positions, (q_latent.shape[0], -1))
    is_contiguous("positions", positions)
    on_device_of("positions", positions, q_latent)
    if positions.shape[1] == 0:
        refuse("positions", "must have at least one column", tuple(positions.shape))
    if positions.shape[0] and known(positions) and known(query_start) and known(seq_lens):
        _check_positions(positions, query_start, seq_lens)


def _check_positions(positions: Tensor, query_start: Tensor, seq_lens: Tensor) -> None:
    rows = query_start.diff()
    own = torch.arange(positions.shape[0]) + (seq_lens - query_start[1:]).repeat_interleave(rows)
    if bool((positions[:, 0] < 0).any()) or bool((positions < -1).any()):
        refuse("positions", "every row must start with a position, with -1 behind the last", int(positions.min()))
    if bool((positions[:, 1:] > -1).logical_and_(positions[:, :-1] < 0).any()):
        refuse("positions", "must have -1 behind the last position of a row only", "-1 before another")
    if bool((positions.amax(1) > own).any()):
        refuse("positions", "must not be ahead of the query's own", int(positions.max()))


def _fake_sparse_mla(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    positions: Tensor,
    scale: float,
) -> Tensor:
    return torch.empty_like(q_latent)


def _indexer_samples(where: device) -> Iterator[Case]:
    """DeepSeek-V3.2 has 64 indexer heads of 128. Small whole numbers: scores are exact, and equal ones do occur."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    for model, heads, size, top_k in ((TINY, 4, 32, 8), (DEEPSEEK_V3, 64, 128, 128), (DEEPSEEK_V3, 64, 128, 2048)):
        for batch in SMALL if model is TINY else LARGE:
            paging = batch.paging(generator, where)
            for dtype, atol, rtol in tolerances(batch):
                q = torch.randint(-2, 3, (batch.tokens, heads, size), generator=generator).to(where, dtype)
                keys = torch.randint(-2, 3, (batch.num_blocks, batch.block_size, size), generator=generator)
                weights = torch.randint(-8, 17, (batch.tokens, heads), generator=generator).to(where, torch.float32) / 8
                inputs = (q, weights, keys.to(where, dtype), *paging, top_k)
                name = case_name("indexer_top_k", f"{model.name}-{top_k}", batch, dtype)
                yield Case(name, inputs, atol, rtol)


def _sparse_mla_samples(where: device) -> Iterator[Case]:
    generator = torch.Generator(device="cpu").manual_seed(0)
    for model, heads, top_k, batches in (
        (TINY, TINY.heads, 8, SMALL),
        (DEEPSEEK_V3, DEEPSEEK_V3.heads, 64, LARGE),
        (DEEPSEEK_V3, 16, 2048, LARGE[:1]),
    ):
        for batch in batches:
            yield from _sparse_mla_cases(generator, where, model, batch, heads, top_k)


def _sparse_mla_cases(
    generator: Generator, where: device, model: ModelShape, batch: Batch, heads: int, top_k: int
) -> Iterator[Case]:
    paging = batch.paging(generator, where)
    positions = torch.full((batch.tokens, top_k), -1, dtype=torch.int32)
    own = [n - m + i for m, n in zip(batch.query_lens, batch.seq_lens, strict=True) for i in range(m)]
    for row, position in enumerate(own):
        chosen = torch.randperm(position + 1, generator=generator, dtype=torch.int32)[:top_k]
        positions[row, : len(chosen)] = chosen
    for dtype, atol, rtol in tolerances(batch):
        q_latent = normal(generator, where, dtype, batch.tokens, heads, model.rank)
        q_rope = normal(generator, where, dtype, batch.tokens, heads, model.rope)
        cache = normal(generator, where, dtype, batch.num_blocks, batch.block_size, model.rank + model.rope)
        inputs = (q_latent, q_rope, cache, *paging, positions.to(where), (model.rank + model.rope) ** -0.5)
        name = case_name("sparse_mla_attention", f"{model.name}-{heads}-heads-{top_k}", batch, dtype)
        yield Case(name, inputs, atol, rtol)


INDEXER_TOP_K = declare("indexer_top_k", _indexer_top_k, _fake_indexer, _check_indexer, _indexer_samples)
indexer_top_k = INDEXER_TOP_K.call
SPARSE_MLA_ATTENTION = declare(
    "sparse_mla_attention", _sparse_mla_attention, _fake_sparse_mla, _check_sparse_mla, _sparse_mla_samples
)
sparse_mla_attention = SPARSE_MLA_ATTENTION.call

OPS = (INDEXER_TOP_K, SPARSE_MLA_ATTENTION)
