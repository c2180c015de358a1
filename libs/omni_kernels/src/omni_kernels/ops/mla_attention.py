"""Multi-head latent attention in its absorbed form (DeepSeek-V2, 2024): all heads read one latent vector a token."""

from collections.abc import Iterator

import torch
from torch import Tensor, device

from omni_kernels.case import DEEPSEEK_V3, TINY, Case, declare
from omni_kernels.checks import has_shape, is_positive, refuse
from omni_kernels.ops.paged_samples import LARGE, SMALL, case_name, normal, tolerances
from omni_kernels.ops.paging import attend, check_cache, check_paging, check_queries, gather, rows_at_a_time, spans


def _mla_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of q_latent (T, H, R) and q_rope (T, H, P) over cache (N, B, R + P): (T, H, R).

    A token's cache row holds its normalised latent and then its rotated key; the latent is key and value at once. The
    caller has multiplied the queries by the up-projection of the keys, and multiplies the result by that of the
    values; `scale` is that of the unabsorbed heads. Rows and positions are those of `paged_attention`.
    Computes in float32; the result has the dtype of `q_latent`. Raises ValueError for what does not fit together.
    """
    out = torch.empty_like(q_latent)
    for span in spans(query_start, seq_lens):
        keys = gather(cache, block_table[span.row], 0, span.length).unsqueeze(1)
        values = keys[..., : q_latent.shape[2]]
        positions = torch.arange(span.length, device=q_latent.device)
        for piece in span.pieces(rows_at_a_time(q_latent.shape[1], span.length)):
            seen = positions[: piece.length] <= positions[piece.start : piece.length].unsqueeze(1)
            rows = slice(piece.first, piece.last)
            q = torch.cat((q_latent[rows], q_rope[rows]), -1)
            out[rows] = attend(q, keys[: piece.length], values[: piece.length], seen, scale)
    return out


def check_latents(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> None:
    check_cache("cache", cache, 3)
    check_queries("q_latent", q_latent, "cache", cache)
    check_queries("q_rope", q_rope, "cache", cache)
    has_shape("q_rope", q_rope, (*q_latent.shape[:2], -1))
    if cache.shape[2] != q_latent.shape[2] + q_rope.shape[2]:
        refuse("cache", f"rows must hold {q_latent.shape[2]} + {q_rope.shape[2]} values", cache.shape[2])
    is_positive("scale", scale)
    check_paging(q_latent.shape[0], cache, block_table, query_start, seq_lens)


def _fake(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    return torch.empty_like(q_latent)


def _samples(where: device) -> Iterator[Case]:
    """DeepSeek-V3 and Pangu Ultra MoE have the same latents; 16 heads are those of a rank in eight-way parallelism."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    for model, heads in ((TINY, TINY.heads), (DEEPSEEK_V3, DEEPSEEK_V3.heads), (DEEPSEEK_V3, 16)):
        for batch in SMALL if model is TINY else LARGE:
            paging = batch.paging(generator, where)
            for dtype, atol, rtol in tolerances(batch):
                q_latent = normal(generator, where, dtype, batch.tokens, heads, model.rank)
                q_rope = normal(generator, where, dtype, batch.tokens, heads, model.rope)
                cache = normal(generator, where, dtype, batch.num_blocks, batch.block_size, model.rank + model.rope)
                inputs = (q_latent, q_rope, cache, *paging, (model.rank + model.rope) ** -0.5)
                name = case_name("mla_attention", f"{model.name}-{heads}-heads", batch, dtype)
                yield Case(name, inputs, atol, rtol)


MLA_ATTENTION = declare("mla_attention", _mla_attention, _fake, check_latents, _samples)
mla_attention = MLA_ATTENTION.call

OPS = (MLA_ATTENTION,)
