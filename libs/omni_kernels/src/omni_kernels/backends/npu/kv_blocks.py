"""Writing to caches on Ascend. `kv_gather` needs no kernel: its meaning is one index_select, which Ascend has."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch_npu
from torch import Tensor

from omni_kernels.backends.npu.fused_attention import check_contiguous
from omni_kernels.checks import unsupported

_SCATTERED = (torch.float32, torch.float16, torch.bool, torch.bfloat16, torch.int64, torch.int8)


def _kv_write(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """The call takes no slot for "nowhere", so skipped rows are taken out first, which synchronises."""
    check_contiguous("key_cache", key_cache)
    check_contiguous("value_cache", value_cache)
    rows = (slots >= 0).nonzero().flatten()
    if rows.numel():
        torch_npu.npu_scatter_pa_kv_cache(
            key[rows], value[rows], key_cache, value_cache, slots[rows], cache_mode="Norm"
        )


def _kv_scatter(cache: Tensor, blocks: Tensor, data: Tensor) -> None:
    if cache.dtype not in _SCATTERED:
        unsupported("cache", f"dtype must be one of {_SCATTERED}", cache.dtype)
    if blocks.numel():
        torch_npu.npu_scatter_nd_update_(cache, blocks.unsqueeze(1), data)


def _kv_gather_int8(cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of zeros are set to 0: what the call makes of 0 / 0 is not documented."""
    if cache.dtype not in (torch.bfloat16, torch.float16):
        unsupported("cache", "dtype must be bfloat16 or float16", cache.dtype)
    packed, scale = torch_npu.npu_dynamic_quant(cache.index_select(0, blocks))
    return packed.masked_fill(scale.unsqueeze(-1) == 0, 0), scale


def _kv_scatter_int8(cache: Tensor, blocks: Tensor, data: Tensor, scale: Tensor) -> None:
    _kv_scatter(cache, blocks, (data * scale.unsqueeze(-1)).to(cache.dtype))


KERNELS: Mapping[str, Callable[..., Any]] = {
    "kv_write": _kv_write,
    "kv_scatter": _kv_scatter,
    "kv_gather_int8": _kv_gather_int8,
    "kv_scatter_int8": _kv_scatter_int8,
}
