"""Writing into caches as torch_npu documents it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from omni_kernels.contract.twins.documented import refuse_given, require, require_dtype

_SCATTERED = (torch.float32, torch.float16, torch.bool, torch.bfloat16, torch.int64, torch.int8)


def npu_scatter_nd_update_(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """input[indices[i]] = updates[i]; the last dimension of `indices` counts the dimensions it indexes."""
    require_dtype("input", input, *_SCATTERED)
    require_dtype("updates", updates, input.dtype)
    require_dtype("indices", indices, torch.int32, torch.int64)
    require(indices.ndim >= 2 and indices.shape[-1] <= input.ndim, "indices: at least two dimensions")
    depth = indices.shape[-1]
    require(updates.shape == (*indices.shape[:-1], *input.shape[depth:]), "updates: shape does not follow from indices")
    sizes = torch.tensor(input.shape[:depth])
    require(bool(((indices >= 0) & (indices < sizes)).all()), "indices: out of range")
    input[indices.long().unbind(-1)] = updates
    return input


def npu_scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    cache_mode: str | None = "PA_NZ",
    **unused: Any,
) -> None:
    """Row i of key (T, heads, size) and of value goes to slot i of its cache (blocks, block_size, heads, size)."""
    refuse_given(**unused)
    require(cache_mode in (None, "Norm"), "cache_mode: only the plain arrangement is modelled")
    require_dtype("slot_mapping", slot_mapping, torch.int32, torch.int64)
    for name, rows, cache in (("key", key, key_cache), ("value", value, value_cache)):
        require_dtype(name, rows, key_cache.dtype)
        require(
            rows.ndim == 3 and cache.ndim == 4 and rows.shape[1:] == cache.shape[2:], f"{name}: does not fit its cache"
        )
        require(rows.is_contiguous() and cache.is_contiguous(), f"{name}: must be contiguous")
    require(key.shape[:2] == value.shape[:2] and slot_mapping.shape == key.shape[:1], "slot_mapping: one for each row")
    slots = slot_mapping.long()
    require(
        bool(((slots >= 0) & (slots < key_cache.shape[0] * key_cache.shape[1])).all()), "slot_mapping: out of range"
    )
    require(len(slots.unique()) == len(slots), "slot_mapping: the same slot twice")
    key_cache.flatten(0, 1)[slots] = key
    value_cache.flatten(0, 1)[slots] = value


TWINS: Mapping[str, Callable[..., Any]] = {
    "npu_scatter_nd_update_": npu_scatter_nd_update_,
    "npu_scatter_pa_kv_cache": npu_scatter_pa_kv_cache,
}
