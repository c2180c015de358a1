"""Routing, permutation and grouped matrix products as torch_npu documents them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omni_kernels.contract.twins.documented import FLOATS, GARBAGE, HALVES, refuse_given, require, require_dtype

# Numbers of dtypes where an op's schema has an int for them.
_DTYPES: Mapping[int | None, torch.dtype | None] = {None: None, 5: torch.float16, 15: torch.bfloat16, 6: torch.float32}


def npu_moe_gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, experts int32, scores float32): experts by score + bias within the best groups, weights by score.

    norm_type 0 is softmax and its weights are as they are; 1 is sigmoid and its weights are divided by their sum + eps.
    A group is worth its best (group_select_mode 0) or its two best (1). Equal scores: the lower expert is taken.
    """
    refuse_given(input_ids=input_ids, tid2eid=tid2eid)
    experts = x.shape[-1]
    require_dtype("x", x, *FLOATS)
    require(x.ndim == 2 and experts <= 2048, "x: two dimensions and up to 2048 experts")
    require(renorm == 0 and norm_type in (0, 1) and group_select_mode in (0, 1), "renorm, norm_type, group_select_mode")
    require(group_count > 0 and experts % group_count == 0, "group_count: does not divide the experts")
    size = experts // group_count
    require(size > 2 and -(-size // 32) * 32 * group_count <= 2048, "group_count: groups of 3 experts and more")
    require(1 <= k_group <= group_count and 1 <= k <= k_group * size, "k, k_group: out of range")
    if bias is not None:
        require_dtype("bias", bias, x.dtype)
        require(bias.shape == (experts,), "bias: one for each expert")
    scores = x.float().softmax(-1) if norm_type == 0 else x.float().sigmoid()
    choice = scores if bias is None else scores + bias.float()
    if group_count > 1:
        grouped = choice.view(len(x), group_count, size)
        worth = grouped.topk(1 + group_select_mode, -1).values.sum(-1)
        kept = torch.zeros_like(worth, dtype=torch.bool)
        kept.scatter_(1, worth.argsort(dim=-1, descending=True, stable=True)[:, :k_group], True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).view(len(x), experts)
    chosen = choice.argsort(dim=-1, descending=True, stable=True)[:, :k]
    weights = scores.gather(1, chosen)
    if norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    undefined = torch.full_like(scores, torch.nan)
    return (weights * routed_scaling_factor).to(x.dtype), chosen.int(), scores if out_flag else undefined


def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows, index, tokens of each expert, undefined): rows of x ordered by expert, those outside the range undefined.

    row_idx_type 0: index[token * K + i] is the place in rows, -1 outside the range; 1: index[place] is token * K + i,
    undefined past the rows that are in the range.
    """
    refuse_given(scale=scale, offset=offset)
    rows, top_k = expert_idx.shape
    require_dtype("x", x, *FLOATS, torch.int8)
    require_dtype("expert_idx", expert_idx, torch.int32)
    require(x.ndim == 2 and len(x) == rows, "x, expert_idx: as many rows")
    require(active_num in (-1, 0, rows * top_k), "active_num: not modelled")
    require(0 < expert_num <= 10240, "expert_num: out of range")
    require(drop_pad_mode == 0 and quant_mode == -1, "drop_pad_mode, quant_mode: not modelled")
    require(expert_tokens_num_flag and expert_tokens_num_type == 1, "expert_tokens_num_type, _flag: not modelled")
    first, last = active_expert_range or (0, expert_num)
    require(0 <= first <= last <= expert_num, "active_expert_range: out of range")
    flat = expert_idx.flatten().long()
    require(bool((flat < expert_num).all()), "expert_idx: beyond the number of experts")
    local = (flat >= first) & (flat < last)
    order = flat.masked_fill(~local, expert_num).argsort(stable=True)
    count = int(local.sum())
    expanded = x[order // top_k]
    expanded[count:] = torch.nan if x.is_floating_point() else GARBAGE
    index = torch.full((rows * top_k,), -1 if row_idx_type == 0 else GARBAGE, dtype=torch.int32)
    if row_idx_type == 0:
        index[order[:count]] = torch.arange(count, dtype=torch.int32)
    else:
        index[:count] = order[:count].int()
    tokens = torch.bincount(flat[local] - first, minlength=last - first)
    return expanded, index, tokens, torch.full((rows * top_k,), torch.nan)


def npu_moe_token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """(rows ordered by index, place of token * K + i among them int32), stable."""
    require_dtype("tokens", tokens, torch.bfloat16)
    require_dtype("indices", indices, torch.int64, torch.int32)
    require(not padded_mode and not num_out_tokens, "padded_mode, num_out_tokens: not modelled")
    require(indices.ndim == 2 and len(indices) == len(tokens) and indices.shape[1] <= 512, "indices: (tokens, top k)")
    require(bool((indices >= 0).all()), "indices: must not be negative")
    order = indices.flatten().argsort(stable=True)
    return tokens[order // indices.shape[1]], order.argsort().int()


def npu_moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> Tensor:
    """Sum over i of rows[sorted_indices[token * K + i]] * probs[token, i]; K = 1 without probs."""
    require_dtype("permuted_tokens", permuted_tokens, torch.bfloat16)
    require_dtype("sorted_indices", sorted_indices, torch.int64, torch.int32)
    require(not padded_mode and restore_shape is None, "padded_mode: not modelled")
    rows = permuted_tokens.float()[sorted_indices.long()]
    if probs is None:
        return rows.to(permuted_tokens.dtype)
    require_dtype("probs", probs, torch.bfloat16)
    return (rows.view(*probs.shape, -1) * probs.float().unsqueeze(-1)).sum(1).to(permuted_tokens.dtype)


def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    """skip1 + skip2 + sum over i of scales[token, i] * rows[index[token + i * tokens]]: the index runs down columns."""
    refuse_given(bias=bias)
    require_dtype("expanded_permuted_rows", expanded_permuted_rows, *FLOATS)
    require_dtype("expanded_src_to_dst_row", expanded_src_to_dst_row, torch.int32)
    require(drop_pad_mode == 0, "drop_pad_mode: only 0 is documented")
    require(not (skip2 is None and skip1 is not None), "skip1: needs skip2")
    for name, x in (("skip1", skip1), ("skip2", skip2), ("scales", scales)):
        if x is not None:
            require_dtype(name, x, expanded_permuted_rows.dtype)
    top_k = scales.shape[1] if scales is not None else int(k or 1)
    index = expanded_src_to_dst_row.long().view(top_k, -1).T
    require(bool(((index >= 0) & (index < len(expanded_permuted_rows))).all()), "expanded_src_to_dst_row: out of range")
    rows = expanded_permuted_rows.float()[index]
    total = (rows if scales is None else rows * scales.float().unsqueeze(-1)).sum(1)
    for skip in (skip1, skip2):
        total = total if skip is None else total + skip.float()
    return total.to(expanded_permuted_rows.dtype)


def npu_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    scale: Sequence[Tensor] | None = None,
    antiquant_scale: Sequence[Tensor] | None = None,
    antiquant_offset: Sequence[Tensor] | None = None,
    per_token_scale: Sequence[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    output_dtype: int | None = None,
    **unused: Any,
) -> list[Tensor]:
    """Rows of the one x, in groups, times the matrix of their group in the one weight (E, K, N).

    int8 in both gives the int32 product times `scale` (E, N) of the column and `per_token_scale` (rows,) of the row.
    A weight int32 of eight int4 beside a floating x is (int4 + antiquant_offset) * antiquant_scale, (E, K / size, N).
    Rows past the groups are undefined.
    """
    refuse_given(**unused)
    require(len(x) == len(weight) == 1 and weight[0].ndim == 3, "only one x and one weight (E, K, N) are modelled")
    require(split_item in (2, 3) and group_type == 0, "split_item, group_type: one output needs 2 or 3 and 0")
    require(group_list is not None and group_list.dtype is torch.int64, "group_list: int64 tensor")
    assert group_list is not None
    rows, matrices = x[0], weight[0]
    require(rows.ndim == 2 and rows.shape[1] == matrices.shape[1], "x: (rows, K)")
    require(group_list.shape == (len(matrices),), "group_list: one for each matrix")
    require(group_list_type in (0, 1), "group_list_type: 0 or 1")
    require(not (group_list_type == 1 and len(matrices) == 1), "group_list: counts need two groups or more")
    counts = group_list if group_list_type == 1 else group_list.diff(prepend=group_list.new_zeros(1))
    require(bool((counts >= 0).all()) and int(counts.sum()) <= len(rows), "group_list: does not fit the rows")
    if antiquant_scale is not None:
        matrices, out_dtype = _dequantized(rows, matrices, antiquant_scale[0], antiquant_offset), rows.dtype
        require(scale is None and _DTYPES[output_dtype] in (None, rows.dtype), "output_dtype: that of x")
    else:
        out_dtype = _output_dtype(rows, matrices, scale, per_token_scale, output_dtype)
    columns = matrices.shape[2]
    undefined = torch.nan if out_dtype.is_floating_point else GARBAGE
    out = torch.full((len(rows), columns), undefined, dtype=out_dtype)
    start = 0
    for group, count in enumerate(counts.tolist()):
        part = slice(start, start + count)
        out[part] = _product(rows[part], matrices[group], group, part, scale, per_token_scale).to(out_dtype)
        start += count
    return [out]


def _dequantized(x: Tensor, packed: Tensor, scale: Tensor, offset: Sequence[Tensor] | None) -> Tensor:
    require_dtype("x", x, *HALVES)
    require_dtype("weight", packed, torch.int32)
    require_dtype("antiquant_scale", scale, x.dtype)
    require(offset is not None and offset[0].dtype is x.dtype, "antiquant_offset: needed, in the dtype of x")
    assert offset is not None
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    nibbles = (packed.unsqueeze(-1) >> shifts) & 15
    codes = torch.where(nibbles > 7, nibbles - 16, nibbles).flatten(-2)
    require(scale.ndim == 3 and codes.shape[1] % scale.shape[1] == 0, "antiquant_scale: (E, K / size, N)")
    require(scale.shape[2] == codes.shape[2] and offset[0].shape == scale.shape, "antiquant_scale: does not fit")
    size = codes.shape[1] // scale.shape[1]
    spread = (each.repeat_interleave(size, 1) for each in (scale, offset[0]))
    wide_scale, wide_offset = (each.float() for each in spread)
    return (codes.float() + wide_offset) * wide_scale


def _output_dtype(
    x: Tensor,
    weight: Tensor,
    scale: Sequence[Tensor] | None,
    per_token_scale: Sequence[Tensor] | None,
    output_dtype: int | None,
) -> torch.dtype:
    """By the table of the documentation: what x, weight and scales allow."""
    asked = torch.int32 if output_dtype == 3 else _DTYPES[output_dtype]
    if x.dtype is not torch.int8:
        require(x.dtype in FLOATS and weight.dtype is x.dtype, "x, weight: of the same floating dtype")
        require(scale is None and per_token_scale is None, "scale: for int8 only")
        require(asked in (None, x.dtype), "output_dtype: that of x")
        return x.dtype
    require(weight.dtype is torch.int8, "weight: int8, as x is")
    if scale is None:
        require(asked is torch.int32 and per_token_scale is None, "output_dtype: int32 without scales")
        return torch.int32
    wanted = torch.bfloat16 if scale[0].dtype is torch.bfloat16 else torch.float16
    require(scale[0].dtype in (torch.bfloat16, torch.float32), "scale: bfloat16 or float32")
    require(scale[0].shape == (len(weight), weight.shape[2]), "scale: (E, N)")
    require(asked is wanted, f"output_dtype: {wanted} for a scale of {scale[0].dtype}")
    require(per_token_scale is None or per_token_scale[0].dtype is torch.float32, "per_token_scale: float32")
    require(per_token_scale is None or per_token_scale[0].shape == (len(x),), "per_token_scale: (rows,)")
    return wanted


def _product(
    rows: Tensor,
    matrix: Tensor,
    group: int,
    part: slice,
    scale: Sequence[Tensor] | None,
    per_token_scale: Sequence[Tensor] | None,
) -> Tensor:
    if rows.dtype is not torch.int8:
        return rows.float() @ matrix.float()
    product = (rows.double() @ matrix.double()).to(torch.int32)
    if scale is None:
        return product
    scaled = product.float() * scale[0][group].float()
    return scaled if per_token_scale is None else scaled * per_token_scale[0][part].unsqueeze(-1)


TWINS: Mapping[str, Callable[..., Any]] = {
    "npu_moe_gating_top_k": npu_moe_gating_top_k,
    "npu_moe_init_routing_v2": npu_moe_init_routing_v2,
    "npu_moe_token_permute": npu_moe_token_permute,
    "npu_moe_token_unpermute": npu_moe_token_unpermute,
    "npu_moe_finalize_routing": npu_moe_finalize_routing,
    "npu_grouped_matmul": npu_grouped_matmul,
}
