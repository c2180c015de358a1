"""Tokens into a cache in blocks, and whole blocks out of one cache and into another, as they are or packed to int8."""

from collections.abc import Iterator

import torch
from torch import Tensor, device

from omni_kernels.case import MODELS, Case, ModelShape, declare, dtype_name
from omni_kernels.checks import FLOATS, has_dims, has_dtype, has_shape, on_device_of, refuse, wide
from omni_kernels.ops.paged_samples import normal
from omni_kernels.ops.paging import check_cache, known
from omni_kernels.ops.quant import quantized


def _kv_write(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Write key (T, Hkv, D) and value (T, Hkv, Dv) to slots int64 (T) of the caches (N, B, Hkv, D) and (N, B, Hkv, Dv).

    Slot s is row s % B of block s // B; -1 writes nothing, and no slot comes twice. Mutates both caches, which may be
    strided views, their last dimension contiguous. Raises ValueError for what does not fit together.
    """
    rows = (slots >= 0).nonzero().flatten()
    where = slots[rows]
    block, row = where // key_cache.shape[1], where % key_cache.shape[1]
    key_cache[block, row] = key[rows]
    value_cache[block, row] = value[rows]


def _check_write(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    check_cache("key_cache", key_cache, 4)
    check_cache("value_cache", value_cache, 4)
    has_shape("value_cache", value_cache, (*key_cache.shape[:3], -1))
    has_shape("key", key, (-1, *key_cache.shape[2:]))
    has_shape("value", value, (key.shape[0], *value_cache.shape[2:]))
    for name, x in (("key", key), ("value", value), ("value_cache", value_cache)):
        has_dtype(name, x, key_cache.dtype)
        on_device_of(name, x, key_cache)
    has_shape("slots", slots, key.shape[:1])
    _check_indices("slots", slots, key_cache, -1, key_cache.shape[0] * key_cache.shape[1])


def _kv_gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """The blocks int64 (n) of cache (N, ...), of real numbers or bits: contiguous (n, ...)."""
    return cache.index_select(0, blocks)


def _check_gather(cache: Tensor, blocks: Tensor) -> None:
    if cache.ndim < 2:
        refuse("cache", "must have at least 2 dimensions", tuple(cache.shape))
    if cache.is_complex():
        refuse("cache", "must hold real numbers", cache.dtype)
    has_dims("blocks", blocks, 1)
    _check_indices("blocks", blocks, cache, 0, cache.shape[0])


def _kv_scatter(cache: Tensor, blocks: Tensor, data: Tensor) -> None:
    """Write data (n, ...) to the blocks int64 (n) of cache (N, ...). Mutates `cache`; no block comes twice."""
    cache.index_copy_(0, blocks, data)


def _check_scatter(cache: Tensor, blocks: Tensor, data: Tensor) -> None:
    _check_gather(cache, blocks)
    has_dtype("data", data, cache.dtype)
    has_shape("data", data, (blocks.shape[0], *cache.shape[1:]))
    on_device_of("data", data, cache)


def _kv_gather_int8(cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks int64 (n) of cache (N, B, ..., D) packed: int8 (n, B, ..., D) and scales float32 (n, B, ...).

    Each row of D numbers has its own scale, its largest magnitude / 127; a number is off by half a scale at most, and
    a row of zeros has scale 0. D + 4 bytes a row, of 2 D in bfloat16. Raises ValueError for what does not fit.
    """
    return quantized(wide(cache.index_select(0, blocks)))


def _check_gather_int8(cache: Tensor, blocks: Tensor) -> None:
    if cache.ndim < 3:
        refuse("cache", "must have at least 3 dimensions", tuple(cache.shape))
    has_dtype("cache", cache, *FLOATS)
    if cache.shape[-1] == 0:
        refuse("cache", "rows must not be empty", tuple(cache.shape))
    _check_gather(cache, blocks)


def _kv_scatter_int8(cache: Tensor, blocks: Tensor, data: Tensor, scale: Tensor) -> None:
    """Unpack data int8 (n, B, ..., D) and scale float32 (n, B, ...) to the blocks int64 (n) of cache. Mutates `cache`.

    The inverse of `kv_gather_int8`; no block comes twice.
    """
    cache.index_copy_(0, blocks, (data * scale.unsqueeze(-1)).to(cache.dtype))


def _check_scatter_int8(cache: Tensor, blocks: Tensor, data: Tensor, scale: Tensor) -> None:
    _check_gather_int8(cache, blocks)
    has_dtype("data", data, torch.int8)
    has_shape("data", data, (blocks.shape[0], *cache.shape[1:]))
    has_dtype("scale", scale, torch.float32)
    has_shape("scale", scale, data.shape[:-1])
    on_device_of("data", data, cache)
    on_device_of("scale", scale, cache)


def _check_indices(argument: str, indices: Tensor, cache: Tensor, low: int, count: int) -> None:
    has_dtype(argument, indices, torch.int64)
    on_device_of(argument, indices, cache)
    if indices.numel() and known(indices):
        lowest, highest = indices.aminmax()
        if lowest < low or highest >= count:
            refuse(argument, f"must be from {low} to {count - 1}", f"{int(lowest)} to {int(highest)}")


def _fake_write(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    return None


def _fake_scatter(cache: Tensor, blocks: Tensor, data: Tensor) -> None:
    return None


def _fake_scatter_int8(cache: Tensor, blocks: Tensor, data: Tensor, scale: Tensor) -> None:
    return None


def _fake_gather(cache: Tensor, blocks: Tensor) -> Tensor:
    return cache.new_empty(blocks.shape[0], *cache.shape[1:])


def _fake_gather_int8(cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    shape = (blocks.shape[0], *cache.shape[1:])
    return cache.new_empty(shape, dtype=torch.int8), cache.new_empty(shape[:-1], dtype=torch.float32)


def _rows(model: ModelShape) -> tuple[tuple[int, int], tuple[int, int]]:
    """What a token leaves in the two caches: a key and a value a head, or a latent and a rotated key."""
    if model.rank:
        return (1, model.rank), (1, model.rope)
    return (model.kv_heads, model.head_dim), (model.kv_heads, model.head_dim)


def _caches(where: device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Caches of 6 blocks, one row of them zero, and 4 of their blocks in no order."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    for model in MODELS:
        for dtype in (torch.float32, torch.bfloat16):
            blocks = torch.randperm(6, generator=generator)[:4].to(where)
            cache = normal(generator, where, dtype, 6, 16, *_rows(model)[0])
            cache[blocks[0], 0] = 0
            yield f"{model.name}-{dtype_name(dtype)}", cache, blocks


def _write_samples(where: device) -> Iterator[Case]:
    generator = torch.Generator(device="cpu").manual_seed(0)
    for model in MODELS:
        for tokens in (0, 1, 21):
            for dtype in (torch.float32, torch.bfloat16):
                rows = [normal(generator, where, dtype, tokens, *row) for row in _rows(model)]
                caches = [normal(generator, where, dtype, 4, 16, *row) for row in _rows(model)]
                slots = torch.randperm(64, generator=generator)[:tokens]
                slots[1::5] = -1
                name = f"kv_write-{model.name}-{tokens}-{dtype_name(dtype)}"
                yield Case(name, (*rows, *caches, slots.to(where)), 0.0, 0.0)


def _gather_samples(where: device) -> Iterator[Case]:
    for name, cache, blocks in _caches(where):
        yield Case(f"kv_gather-{name}", (cache, blocks), 0.0, 0.0)


def _scatter_samples(where: device) -> Iterator[Case]:
    for name, cache, blocks in _caches(where):
        yield Case(f"kv_scatter-{name}", (cache, blocks, -cache[blocks]), 0.0, 0.0)


def _gather_int8_samples(where: device) -> Iterator[Case]:
    for name, cache, blocks in _caches(where):
        yield Case(f"kv_gather_int8-{name}", (cache, blocks), 0.0, 1e-6, loose=(0,))


def _scatter_int8_samples(where: device) -> Iterator[Case]:
    for name, cache, blocks in _caches(where):
        packed = _kv_gather_int8(cache, blocks)
        rtol = 1e-6 if cache.dtype is torch.float32 else 8e-3
        yield Case(f"kv_scatter_int8-{name}", (cache, blocks, *packed), 0.0, rtol)


KV_WRITE = declare(
    "kv_write", _kv_write, _fake_write, _check_write, _write_samples, mutates=("key_cache", "value_cache")
)
KV_GATHER = declare("kv_gather", _kv_gather, _fake_gather, _check_gather, _gather_samples)
KV_SCATTER = declare("kv_scatter", _kv_scatter, _fake_scatter, _check_scatter, _scatter_samples, mutates=("cache",))
KV_GATHER_INT8 = declare("kv_gather_int8", _kv_gather_int8, _fake_gather_int8, _check_gather_int8, _gather_int8_samples)
KV_SCATTER_INT8 = declare(
    "kv_scatter_int8",
    _kv_scatter_int8,
    _fake_scatter_int8,
    _check_scatter_int8,
    _scatter_int8_samples,
    mutates=("cache",),
)
kv_write = KV_WRITE.call
kv_gather = KV_GATHER.call
kv_scatter = KV_SCATTER.call
kv_gather_int8 = KV_GATHER_INT8.call
kv_scatter_int8 = KV_SCATTER_INT8.call

OPS = (KV_WRITE, KV_GATHER, KV_SCATTER, KV_GATHER_INT8, KV_SCATTER_INT8)
