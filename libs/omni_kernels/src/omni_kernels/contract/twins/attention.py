"""Fused attention over paged caches, and the lightning indexer, as torch_npu documents them. Layout TND only."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omni_kernels.contract.twins.documented import HALVES, refuse_given, require, require_dtype


def _rows(query: Tensor, ends: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[int, slice, int]]:
    """(sequence, its query rows, its number of tokens) from running totals of rows and from token counts."""
    require(len(ends) == len(lengths), "lengths: as many of queries as of keys")
    starts = [0, *ends[:-1]]
    require(all(start <= end for start, end in zip(starts, ends, strict=True)), "query lengths: must not fall")
    require(not ends or ends[-1] == len(query), "query lengths: must end at the number of rows")
    for sequence, (start, end, length) in enumerate(zip(starts, ends, lengths, strict=True)):
        require(end - start <= length, "key lengths: must reach as far as the queries")
        yield sequence, slice(start, end), length


def _paged(cache: Tensor, table: Tensor, sequence: int, length: int) -> Tensor:
    """(length, heads, size) of a sequence, from a cache of (blocks, tokens, heads, size)."""
    require_dtype("block_table", table, torch.int32)
    require(table.ndim == 2 and math.ceil(length / cache.shape[1]) <= table.shape[1], "block_table: too few columns")
    blocks = table[sequence, : math.ceil(length / cache.shape[1])].long()
    require(bool(((blocks >= 0) & (blocks < len(cache))).all()), "block_table: names a block that is not there")
    return cache[blocks].flatten(0, 1)[:length].float()


def _by_tokens(cache: Tensor, heads: int, block_size: int) -> Tensor:
    """Both documented arrangements as (blocks, tokens, heads, size)."""
    if cache.ndim == 3:
        require(cache.shape[1] == block_size and cache.shape[2] <= 65535, "key: (blocks, block_size, H up to 65535)")
        return cache.view(*cache.shape[:2], heads, -1)
    require(cache.shape[1] == heads and cache.shape[2] == block_size, "key: (blocks, heads, block_size, D)")
    return cache.transpose(1, 2)


def _softmax(scores: Tensor, values: Tensor) -> Tensor:
    """scores (heads, rows, tokens), values (tokens, key heads, size): (rows, heads, size)."""
    spread = values.repeat_interleave(scores.shape[0] // values.shape[1], 1)
    return torch.einsum("hrt,thd->rhd", scores.softmax(-1).nan_to_num(0.0), spread)


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    return torch.einsum("rhd,thd->hrt", query.float(), keys.repeat_interleave(query.shape[1] // keys.shape[1], 1))


def _ahead(rows: int, tokens: int) -> Tensor:
    """Where a token lies ahead of the row: the last row sees the last token."""
    return torch.arange(tokens) > torch.arange(tokens - rows, tokens).unsqueeze(1)


def _check_mask(mask: Tensor | None, sparse_mode: int) -> None:
    require((sparse_mode, mask is None) in ((0, True), (3, False)), "sparse_mode: 0 without a mask, or 3 with one")
    if mask is not None:
        require_dtype("atten_mask", mask, torch.bool, torch.int8, torch.uint8)
        require(mask.shape[-2:] == (2048, 2048), "atten_mask: the last dimensions must be 2048, 2048")
        require(torch.equal(mask.bool().view(2048, 2048), _ahead(2048, 2048)), "atten_mask: not what lies ahead")


def _check_paged(query: Tensor, key: Tensor, value: Tensor, rows: Sequence[int], block_size: int, rope: bool) -> None:
    require_dtype("query", query, *(HALVES if rope else (torch.bfloat16,)))
    for name, x in (("key", key), ("value", value)):
        require_dtype(name, x, query.dtype)
        require(x.is_contiguous(), f"{name}: must be contiguous")
    require(key.shape == value.shape, "value: shape of key")
    if rope:
        require(query.shape[2] == 512 and max(rows, default=0) <= 16, "with rope: size 512, up to 16 rows a sequence")
        require(query.shape[1] in (1, 2, 4, 8, 16, 32, 64, 128), "query: heads")
        require(block_size in (16, 128), "block_size: 16 or 128 with rope")
        return
    require(query.shape[2] in (128, 192), "query: size 128 or 192 in layout TND")
    step = 16 if max(rows, default=1) == 1 else 128
    require(0 < block_size <= 512 and block_size % step == 0, f"block_size: a multiple of {step} up to 512")


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Sequence[int] | None,
    lengths: Sequence[int] | None,
    block_table: Tensor | None,
    mask: Tensor | None,
    rope: tuple[Tensor | None, Tensor | None],
    heads: int,
    key_heads: int,
    scale: float,
    layout: str,
    sparse_mode: int,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    require(layout == "TND" and query.ndim == 3, "input_layout: only TND is modelled")
    require(ends is not None and lengths is not None and block_table is not None, "TND over blocks needs all lengths")
    assert ends is not None and lengths is not None and block_table is not None
    key_heads = key_heads or heads
    query_rope, key_rope = rope
    require(heads == query.shape[1] and heads % key_heads == 0, "heads: do not fit")
    require(query_rope is not None or heads // key_heads <= 64, "heads: up to 64 for each of the keys")
    require((query_rope is None) == (key_rope is None), "query_rope, key_rope: both or none")
    rows = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    _check_paged(query, key, value, rows, block_size, query_rope is not None)
    _check_mask(mask, sparse_mode)
    keys, values = (_by_tokens(cache, key_heads, block_size) for cache in (key, value))
    out = torch.empty((*query.shape[:2], values.shape[3]), dtype=query.dtype)
    for sequence, part, length in _rows(query, ends, lengths):
        scores = _scores(query[part], _paged(keys, block_table, sequence, length))
        if query_rope is not None and key_rope is not None:
            require(query_rope.shape == (*query.shape[:2], 64), "query_rope: (T, N, 64)")
            turned = _by_tokens(key_rope, key_heads, block_size)
            scores = scores + _scores(query_rope[part], _paged(turned, block_table, sequence, length))
        if sparse_mode == 3:
            scores = scores.masked_fill(_ahead(scores.shape[1], length), float("-inf"))
        attended = _softmax(scores * scale, _paged(values, block_table, sequence, length))
        out[part] = attended.to(query.dtype)
    return out, torch.full((1,), torch.nan)


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    block_size: int = 0,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """(attention (T, N, D), undefined): lengths are running totals of query rows, and tokens of each sequence."""
    refuse_given(**unused)
    lengths = (actual_seq_lengths, actual_seq_lengths_kv)
    rope = (query_rope, key_rope)
    heads = (num_heads, num_key_value_heads)
    return _fused(
        query, key, value, *lengths, block_table, atten_mask, rope, *heads, scale, input_layout, sparse_mode, block_size
    )


def npu_fused_infer_attention_score_v2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    block_size: int = 0,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """The same under other names."""
    refuse_given(**unused)
    return npu_fused_infer_attention_score(
        query,
        key,
        value,
        atten_mask=atten_mask,
        actual_seq_lengths=actual_seq_qlen,
        actual_seq_lengths_kv=actual_seq_kvlen,
        block_table=block_table,
        query_rope=query_rope,
        key_rope=key_rope,
        num_heads=num_query_heads,
        scale=softmax_scale,
        input_layout=input_layout,
        num_key_value_heads=num_key_value_heads,
        sparse_mode=sparse_mode,
        block_size=block_size,
    )


def npu_sparse_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    sparse_indices: Tensor,
    scale_value: float,
    *,
    block_table: Tensor | None = None,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_kv: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    sparse_block_size: int = 1,
    layout_query: str = "BSND",
    layout_kv: str = "BSND",
    sparse_mode: int = 3,
    attention_mode: int = 0,
    **unused: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(attention (T, N, D), none, none) over the tokens that sparse_indices (T, 1, K) names, -1 behind the last."""
    refuse_given(**unused)
    require(layout_query == "TND" and layout_kv == "PA_BSND", "layouts: only TND over PA_BSND is modelled")
    require(sparse_block_size == 1 and sparse_mode == 3 and attention_mode == 2, "modes: not modelled")
    require(value is not None and query_rope is not None and key_rope is not None, "value, ropes: not modelled without")
    assert value is not None and query_rope is not None and key_rope is not None and block_table is not None
    assert actual_seq_lengths_query is not None and actual_seq_lengths_kv is not None
    for name, x in (("query", query), ("key", key), ("value", value), ("query_rope", query_rope)):
        require_dtype(name, x, *HALVES)
        require_dtype(name, x, query.dtype)
        require(x.is_contiguous(), f"{name}: must be contiguous")
    for name, x in (("sparse_indices", sparse_indices), ("query lengths", actual_seq_lengths_query)):
        require_dtype(name, x, torch.int32)
    require_dtype("key lengths", actual_seq_lengths_kv, torch.int32)
    require(
        query.shape[2] == 512 and query_rope.shape[2] == 64 and key.shape[2] == 1, "sizes: 512 and 64, one key head"
    )
    require(sparse_indices.shape[:2] == (len(query), 1), "sparse_indices: (T, 1, K)")
    out = torch.empty_like(query)
    for sequence, part, length in _rows(query, actual_seq_lengths_query.tolist(), actual_seq_lengths_kv.tolist()):
        keys, values, ropes = (_paged(cache, block_table, sequence, length) for cache in (key, value, key_rope))
        scores = (_scores(query[part], keys) + _scores(query_rope[part], ropes)) * scale_value
        named = sparse_indices[part, 0].long()
        require(bool(((named >= 0).int().diff(dim=-1) <= 0).all()), "sparse_indices: -1 before a position")
        require(bool((named < length).all()), "sparse_indices: beyond the sequence")
        seen = torch.zeros(len(named), length + 1, dtype=torch.bool)
        seen.scatter_(1, named.where(named >= 0, length), True)
        hidden = ~seen[:, :length] | _ahead(len(named), length)
        out[part] = _softmax(scores.masked_fill(hidden, float("-inf")), values).to(query.dtype)
    return out, torch.empty(0), torch.empty(0)


def npu_lightning_indexer(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    *,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_key: Tensor | None = None,
    block_table: Tensor | None = None,
    layout_query: str = "BSND",
    layout_key: str = "BSND",
    sparse_count: int = 2048,
    sparse_mode: int = 3,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """(positions int32 (T, 1, count), none): the tokens of the largest sum of weight * relu(q . k), -1 behind."""
    refuse_given(**unused)
    require(layout_query == "TND" and layout_key == "PA_BSND" and sparse_mode == 3, "layouts, mode: not modelled")
    require(sparse_count in {*range(1, 2049), *range(3072, 8193, 1024)}, "sparse_count: not documented")
    assert actual_seq_lengths_query is not None and actual_seq_lengths_key is not None and block_table is not None
    for name, x in (("query", query), ("key", key), ("weights", weights)):
        require_dtype(name, x, *HALVES)
        require(x.is_contiguous(), f"{name}: must be contiguous")
    for name, x in (("query lengths", actual_seq_lengths_query), ("key lengths", actual_seq_lengths_key)):
        require_dtype(name, x, torch.int32)
    require(weights.shape == query.shape[:2] and key.shape[2] == 1, "weights: (T, N); key: one head")
    found = torch.full((len(query), 1, sparse_count), -1, dtype=torch.int32)
    for sequence, part, length in _rows(query, actual_seq_lengths_query.tolist(), actual_seq_lengths_key.tolist()):
        raw = _scores(query[part], _paged(key, block_table, sequence, length)).relu()
        scores = torch.einsum("hrt,rh->rt", raw, weights[part].float())
        hidden = _ahead(len(scores), length)
        best = scores.masked_fill(hidden, float("-inf")).argsort(dim=-1, descending=True, stable=True)[:, :sparse_count]
        best = best.masked_fill(hidden.gather(1, best), -1)
        found[part, 0, : best.shape[1]] = best.int()
    return found, torch.empty(0)


TWINS: Mapping[str, Callable[..., Any]] = {
    "npu_fused_infer_attention_score": npu_fused_infer_attention_score,
    "npu_fused_infer_attention_score_v2": npu_fused_infer_attention_score_v2,
    "npu_sparse_flash_attention": npu_sparse_flash_attention,
    "npu_lightning_indexer": npu_lightning_indexer,
}
