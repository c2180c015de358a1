"""The least a call must move and compute, and what part of the device's own limits it reaches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes that any implementation must read or write, and operations (a multiply-add is two) on `dtype`."""

    bytes: float
    operations: float = 0.0
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class Roof:
    """What this device reached, doing nothing else: bytes/s of a copy, operations/s of a large product by dtype."""

    bytes_per_s: float
    operations_per_s: Mapping[torch.dtype, float]

    def least_s(self, work: Work) -> float:
        """The shortest time the work can take: the longer of moving and computing."""
        computing = work.operations / self.operations_per_s[work.dtype] if work.operations else 0.0
        return max(work.bytes / self.bytes_per_s, computing)

    def fraction(self, work: Work, seconds: float) -> float:
        """1 at the roof. Above 1 the data came from a cache, or the work is stated too high."""
        return self.least_s(work) / seconds


def work_of(op: str, inputs: Sequence[Any], results: Sequence[Tensor]) -> Work:
    """Of one call; ops that read or write a part of an argument are counted by that part."""
    if op in _PARTIAL:
        return _PARTIAL[op](inputs, results)
    return Work(_bytes(*inputs, *results))


def _bytes(*values: Any) -> float:
    return float(sum(x.numel() * x.element_size() for x in values if isinstance(x, Tensor)))


def _per_row(cache: Tensor) -> int:
    """Bytes a token has in one layer's cache."""
    return cache[0, 0].numel() * cache.element_size()


def _seen(query_start: Tensor, seq_lens: Tensor, most: int | None = None) -> tuple[int, int]:
    """(cached tokens that are read, pairs of query row and position seen), no more than `most` positions a row."""
    read = pairs = 0
    for begin, end, length in zip(query_start.tolist(), query_start.tolist()[1:], seq_lens.tolist(), strict=False):
        counts = [p + 1 if most is None else min(p + 1, most) for p in range(length - (end - begin), length)]
        pairs += sum(counts)
        read += min(length, sum(counts)) if counts else 0
    return read, pairs


def _attention(inputs: Sequence[Any], results: Sequence[Tensor], most: int | None = None) -> Work:
    q, keys, values, _, starts, lengths = inputs[:6]
    read, pairs = _seen(starts, lengths, most)
    per_pair = 2 * q.shape[1] * (keys.shape[-1] + values.shape[-1])
    return Work(_bytes(q, *results) + read * (_per_row(keys) + _per_row(values)), pairs * per_pair, q.dtype)


def _sink_recent(inputs: Sequence[Any], results: Sequence[Tensor]) -> Work:
    return _attention(inputs, results, inputs[7] + inputs[8])


def _latent(inputs: Sequence[Any], results: Sequence[Tensor], most: int | None = None) -> Work:
    latent, rope, cache, _, starts, lengths = inputs[:6]
    read, pairs = _seen(starts, lengths, most)
    per_pair = 2 * latent.shape[1] * (2 * latent.shape[2] + rope.shape[2])
    return Work(_bytes(latent, rope, *results) + read * _per_row(cache), pairs * per_pair, latent.dtype)


def _sparse_latent(inputs: Sequence[Any], results: Sequence[Tensor]) -> Work:
    return _latent(inputs, results, inputs[6].shape[1])


def _indexer(inputs: Sequence[Any], results: Sequence[Tensor]) -> Work:
    q, weights, keys, _, starts, lengths = inputs[:6]
    read, pairs = _seen(starts, lengths)
    return Work(_bytes(q, weights, *results) + read * _per_row(keys), pairs * 2 * q.shape[1] * q.shape[2], q.dtype)


def _grouped(inputs: Sequence[Any], results: Sequence[Tensor]) -> Work:
    """Only the weights of groups that have rows are read."""
    x, tensors = inputs[0], [value for value in inputs[1:] if isinstance(value, Tensor)]
    sizes = next(value for value in tensors if value.dtype is torch.int64)
    weight = next(value for value in tensors if value.ndim == 3 and value.dtype is x.dtype)
    scales = [value for value in tensors if value is not weight and value.is_floating_point()]
    used = int((sizes > 0).sum()) / len(sizes)
    per_expert = _bytes(weight, *(s for s in scales if s.ndim > 1)) * used
    operations = 2 * int(sizes.sum()) * x.shape[1] * results[0].shape[1]
    return Work(_bytes(x, *(s for s in scales if s.ndim == 1), *results) + per_expert, operations, x.dtype)


def _experts(inputs: Sequence[Any], results: Sequence[Tensor]) -> Work:
    x, gate_up, down, weights, slots = inputs
    local = slots[(slots >= 0) & (slots < len(gate_up))]
    used = len(local.unique()) / len(gate_up)
    operations = 2 * local.numel() * (gate_up[0].numel() + down[0].numel())
    return Work(_bytes(x, weights, slots, *results) + _bytes(gate_up, down) * used, operations, x.dtype)


def _written(inputs: Sequence[Any], results: Sequence[Tensor]) -> Work:
    """Keys and values are read and written once; the rest of the caches stays."""
    return Work(2 * _bytes(inputs[0], inputs[1]) + _bytes(inputs[4]))


def _gathered(inputs: Sequence[Any], results: Sequence[Tensor]) -> Work:
    cache, blocks = inputs[:2]
    return Work(_bytes(blocks, *results) + len(blocks) * _bytes(cache[0]))


def _scattered(inputs: Sequence[Any], results: Sequence[Tensor]) -> Work:
    cache, blocks = inputs[:2]
    return Work(_bytes(*inputs[1:]) + len(blocks) * _bytes(cache[0]))


def _verified(inputs: Sequence[Any], results: Sequence[Tensor]) -> Work:
    """One row of the target and of the noise for each sequence, and of the draft where one was drawn from it."""
    draft, offered, _, uniform, noise = inputs
    rows = 3 if offered is not None else 2
    return Work(_bytes(draft, uniform, *results) + rows * _bytes(noise))


_PARTIAL: Mapping[str, Callable[[Sequence[Any], Sequence[Tensor]], Work]] = {
    "paged_attention": _attention,
    "sink_recent_attention": _sink_recent,
    "mla_attention": _latent,
    "sparse_mla_attention": _sparse_latent,
    "indexer_top_k": _indexer,
    "grouped_matmul": _grouped,
    "grouped_matmul_w8a8": _grouped,
    "grouped_matmul_w4a8": _grouped,
    "moe_experts": _experts,
    "kv_write": _written,
    "kv_gather": _gathered,
    "kv_gather_int8": _gathered,
    "kv_scatter": _scattered,
    "kv_scatter_int8": _scattered,
    "speculative_verify": _verified,
}
