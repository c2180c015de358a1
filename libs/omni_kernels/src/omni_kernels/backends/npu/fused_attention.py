"""torch_npu's fused attention over a cache in blocks, as the attention ops call it.

Its limits are those the wheels document; whatever is outside raises Unsupported. Lengths are host lists by its schema:
query_start and seq_lens on the host save a synchronisation a call. On two points the wheels' pages are not of one mind:
whether layout TND goes with a block table, and whether a sequence may have as many query rows as tokens, as a prompt
without a prefix has. It is called here as vllm-ascend calls it, with both. Not run on hardware.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch_npu
from torch import Tensor, device

from omni_kernels.checks import unsupported
from omni_kernels.ops.paging import Span

MAX_SEQUENCES = 4096
_MASK = 2048
_NO_MASK, _CAUSAL = 0, 3
"""Values of sparse_mode: every position up to the length; the last query row sees the last position, and so on up."""


@lru_cache(maxsize=8)
def _causal_mask(where: device) -> Tensor:
    """The one mask that sparse_mode 3 takes, whatever the lengths: 1 hides, above the diagonal."""
    return torch.ones(_MASK, _MASK, dtype=torch.int8, device=where).triu_(1)


def mask_for(pieces: Sequence[Span], where: device) -> tuple[Tensor | None, int]:
    """(atten_mask, sparse_mode): none where every piece is one row, which sees its whole length."""
    if all(piece.last - piece.first == 1 for piece in pieces):
        return None, _NO_MASK
    return _causal_mask(where), _CAUSAL


def ends_and_lengths(pieces: Sequence[Span]) -> tuple[list[int], list[int]]:
    """What the call takes as lengths: query rows up to and with each piece, and tokens of each piece."""
    return [piece.last for piece in pieces], [piece.length for piece in pieces]


def table_of(pieces: Sequence[Span], block_table: Tensor) -> Tensor:
    """The block table with one row for each piece."""
    rows = [piece.row for piece in pieces]
    if rows == list(range(block_table.shape[0])):
        return block_table
    return block_table[torch.tensor(rows, device=block_table.device)]


def grouped(
    q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, pieces: Sequence[Span], scale: float
) -> Tensor:
    """Attention of q (T, Hq, D) over contiguous keys and values (N, B, Hkv, D), all rows in order of `pieces`."""
    mask, sparse_mode = mask_for(pieces, q.device)
    ends, lengths = ends_and_lengths(pieces)
    attended: Tensor = torch_npu.npu_fused_infer_attention_score(
        q,
        keys.flatten(2),
        values.flatten(2),
        atten_mask=mask,
        actual_seq_lengths=ends,
        actual_seq_lengths_kv=lengths,
        block_table=table_of(pieces, block_table),
        num_heads=q.shape[1],
        num_key_value_heads=keys.shape[2],
        scale=scale,
        input_layout="TND",
        sparse_mode=sparse_mode,
        block_size=keys.shape[1],
    )[0]
    return attended


def check_grouped(q: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    """What the fused call asks of paged attention with grouped heads, in layout TND."""
    if q.dtype is not torch.bfloat16:
        unsupported("q", "dtype must be bfloat16", q.dtype)
    if q.shape[2] not in (128, 192):
        unsupported("q", "head size must be 128 or 192", q.shape[2])
    if value_cache.shape != key_cache.shape:
        unsupported(
            "value_cache", f"shape must be that of key_cache, {tuple(key_cache.shape)}", tuple(value_cache.shape)
        )
    if q.shape[1] > 64 * key_cache.shape[2]:
        unsupported("q", f"heads must be at most 64 for each of {key_cache.shape[2]}", q.shape[1])
    if key_cache.shape[2] * key_cache.shape[3] > 65535:
        unsupported("key_cache", "heads * size must be at most 65535", tuple(key_cache.shape))


def check_contiguous(argument: str, cache: Tensor) -> None:
    if not cache.is_contiguous():
        unsupported(argument, "must be contiguous", f"strides {cache.stride()}")


def check_sequences(pieces: Sequence[Span]) -> None:
    if len(pieces) > MAX_SEQUENCES:
        unsupported("query_start", f"must hold at most {MAX_SEQUENCES} sequences", len(pieces))
