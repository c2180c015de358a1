"""Writing keys and values to their slots, and moving whole blocks of a cache, plain or packed to int8.

On Ascend these are row copies at computed addresses; rounding in the int8 forms relies on float32 additions being kept
as written. Not run on Ascend.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from omni_kernels.backends.triton.language import narrow, nearest, power_of_two, programs, warps

_PIECE = 4096
"""Elements of a block that one program copies."""


@triton.jit
def _write(
    key, value, key_cache, value_cache, slots, tokens, block_size,
    key_token, key_row, value_token, value_row, key_block, key_slot, key_head, value_block, value_slot, value_head,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HEADS_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr,
    DV_BLOCK: tl.constexpr,
):  # fmt: skip
    h = tl.arange(0, HEADS_BLOCK)
    d = tl.arange(0, D_BLOCK)
    dv = tl.arange(0, DV_BLOCK)
    is_key = (h < HEADS)[:, None] & (d < D)[None, :]
    is_value = (h < HEADS)[:, None] & (dv < DV)[None, :]
    for token in range(tl.program_id(0).to(tl.int64), tokens, tl.num_programs(0)):
        slot = tl.load(slots + token)
        if slot >= 0:
            key_at = key_cache + (slot // block_size) * key_block + (slot % block_size) * key_slot
            k = tl.load(key + token * key_token + h[:, None] * key_row + d[None, :], mask=is_key)
            tl.store(key_at + h[:, None] * key_head + d[None, :], k, mask=is_key)
            value_at = value_cache + (slot // block_size) * value_block + (slot % block_size) * value_slot
            v = tl.load(value + token * value_token + h[:, None] * value_row + dv[None, :], mask=is_value)
            tl.store(value_at + h[:, None] * value_head + dv[None, :], v, mask=is_value)


@triton.jit
def _copy_blocks(
    cache, data, blocks, pieces, cache_block, cache_group, cache_row, cache_column,
    ROWS: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, FLAT: tl.constexpr, GATHER: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """Piece by piece, block blocks[i] of the cache to row i of `data`, or back. FLAT: blocks have no gaps inside."""
    PER_BLOCK: tl.constexpr = (SIZE + PIECE - 1) // PIECE
    for piece in range(tl.program_id(0).to(tl.int64), pieces, tl.num_programs(0)):
        row = piece // PER_BLOCK
        at = (piece % PER_BLOCK) * PIECE + tl.arange(0, PIECE)
        inside = cache + tl.load(blocks + row) * cache_block
        if FLAT:
            inside = inside + at
        else:
            inside = inside + at // (ROWS * D) * cache_group + at // D % ROWS * cache_row + at % D * cache_column
        outside = data + row * SIZE + at
        if GATHER:
            tl.store(outside, tl.load(inside, mask=at < SIZE), mask=at < SIZE)
        else:
            tl.store(inside, tl.load(outside, mask=at < SIZE), mask=at < SIZE)


@triton.jit
def _row_of_block(cache, blocks, row, cache_block, cache_group, cache_row, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Where row `row` of the chosen blocks, counted through, begins in the cache."""
    block = tl.load(blocks + row // (GROUPS * ROWS))
    return cache + block * cache_block + row // ROWS % GROUPS * cache_group + row % ROWS * cache_row


@triton.jit
def _pack(
    cache, blocks, data, scales, rows, cache_block, cache_group, cache_row, cache_column,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of D values of a chosen block to int8 and its scale."""
    d = tl.arange(0, D_BLOCK)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        at = _row_of_block(cache, blocks, row, cache_block, cache_group, cache_row, GROUPS, ROWS)
        x = tl.load(at + d * cache_column, mask=d < D, other=0.0).to(tl.float32)
        scale = tl.max(tl.abs(x), axis=0) / 127.0
        q = nearest(tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale)))
        tl.store(data + row * D + d, q.to(tl.int8), mask=d < D)
        tl.store(scales + row, scale)


@triton.jit
def _unpack(
    cache, blocks, data, scales, rows, cache_block, cache_group, cache_row, cache_column,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, D_BLOCK)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        at = _row_of_block(cache, blocks, row, cache_block, cache_group, cache_row, GROUPS, ROWS)
        x = tl.load(data + row * D + d, mask=d < D, other=0).to(tl.float32) * tl.load(scales + row)
        tl.store(at + d * cache_column, narrow(x, cache.dtype.element_ty), mask=d < D)


def kv_write(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    tokens, heads, width = key.shape
    if tokens == 0:
        return
    key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (key, value))
    _write[programs(tokens)](
        key, value, key_cache, value_cache, slots.contiguous(), tokens, key_cache.shape[1],
        *key.stride()[:2], *value.stride()[:2],
        *key_cache.stride()[:3], *value_cache.stride()[:3],
        HEADS=heads, D=width, DV=value.shape[2], HEADS_BLOCK=power_of_two(heads), D_BLOCK=power_of_two(width),
        DV_BLOCK=power_of_two(value.shape[2]), num_warps=warps(power_of_two(heads * width)),
    )  # fmt: skip


def _four_dims(cache: Tensor) -> Tensor:
    """The cache as (N, groups, rows, D), a view. Raises RuntimeError for more dimensions that are no view of these."""
    if cache.ndim > 4:
        return cache.view(cache.shape[0], -1, *cache.shape[-2:])
    return cache[:, *[None] * (4 - cache.ndim)]


def _copy(cache: Tensor, data: Tensor, blocks: Tensor, gather: bool) -> None:
    if data.numel() == 0:
        return
    shaped = _four_dims(cache)
    _, _, rows, width = shaped.shape
    size = data[0].numel()
    piece = min(power_of_two(size), _PIECE)
    pieces = len(blocks) * triton.cdiv(size, piece)
    _copy_blocks[programs(pieces)](
        shaped, data, blocks, pieces, *shaped.stride(),
        ROWS=rows, D=width, SIZE=size, FLAT=cache[0].is_contiguous(), GATHER=gather, PIECE=piece,
    )  # fmt: skip


def kv_gather(cache: Tensor, blocks: Tensor) -> Tensor:
    data = cache.new_empty(len(blocks), *cache.shape[1:])
    _copy(cache, data, blocks.contiguous(), gather=True)
    return data


def kv_scatter(cache: Tensor, blocks: Tensor, data: Tensor) -> None:
    _copy(cache, data.contiguous(), blocks.contiguous(), gather=False)


def kv_gather_int8(cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    shape = (len(blocks), *cache.shape[1:])
    data = torch.empty(shape, dtype=torch.int8, device=cache.device)
    scale = torch.empty(shape[:-1], dtype=torch.float32, device=cache.device)
    _convert(_pack, cache, blocks.contiguous(), data, scale)
    return data, scale


def kv_scatter_int8(cache: Tensor, blocks: Tensor, data: Tensor, scale: Tensor) -> None:
    _convert(_unpack, cache, blocks.contiguous(), data.contiguous(), scale.contiguous())


def _convert(kernel: Any, cache: Tensor, blocks: Tensor, data: Tensor, scale: Tensor) -> None:
    if scale.numel() == 0:
        return
    shaped = _four_dims(cache)
    _, groups, rows, width = shaped.shape
    block = power_of_two(width)
    kernel[programs(scale.numel())](
        shaped, blocks, data, scale, scale.numel(), *shaped.stride(),
        GROUPS=groups, ROWS=rows, D=width, D_BLOCK=block, num_warps=warps(block),
    )  # fmt: skip


KERNELS: Mapping[str, Callable[..., Any]] = {
    "kv_write": kv_write,
    "kv_gather": kv_gather,
    "kv_scatter": kv_scatter,
    "kv_gather_int8": kv_gather_int8,
    "kv_scatter_int8": kv_scatter_int8,
}
