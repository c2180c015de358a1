"""A block table cut down to the blocks a decode row keeps, so that plain paged attention runs over them."""

import torch
from torch import Tensor

from omni_kernels.checks import has_dims, has_dtype, has_shape, is_positive, refuse


def compact_blocks(
    block_table: Tensor, seq_lens: Tensor, sink_blocks: int, recent_blocks: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """The first `sink_blocks` and the last `recent_blocks` used blocks of each sequence, and the tokens in them.

    block_table is int32 (S, MB), seq_lens int32 (S). A sequence of L tokens uses n = ceil(L / B) blocks, the last one
    filled up to L. The table that comes back is int32 (S, min(MB, sink_blocks + recent_blocks)), the lengths int32 (S).
    Where n <= sink_blocks + recent_blocks nothing is left out. Else the kept blocks hold the positions
    p < sink_blocks * B and p >= (n - recent_blocks) * B, in this order; a decode row (one query, at position L - 1)
    attends to exactly these. That is sink_recent_attention with sink = sink_blocks * B and
    recent = L - (n - recent_blocks) * B, from (recent_blocks - 1) * B + 1 to recent_blocks * B tokens.
    Keys carry their rotation, so it matters to nobody that their places in the table have changed.

    Works on any device without synchronising. Entries behind the used blocks of a row mean nothing.
    Raises ValueError for wrong shapes and dtypes, sink_blocks < 0, recent_blocks < 1 or block_size < 1.
    """
    _check(block_table, seq_lens, sink_blocks, recent_blocks, block_size)
    columns = torch.arange(min(block_table.shape[1], sink_blocks + recent_blocks), device=block_table.device)
    lengths = seq_lens.to(block_table.device)
    dropped = ((lengths + (block_size - 1)) // block_size - (sink_blocks + recent_blocks)).clamp_(min=0)
    source = torch.where(columns < sink_blocks, columns, columns + dropped.unsqueeze(1))
    return block_table.gather(1, source), lengths - dropped * block_size


def _check(block_table: Tensor, seq_lens: Tensor, sink_blocks: int, recent_blocks: int, block_size: int) -> None:
    has_dims("block_table", block_table, 2)
    has_dtype("block_table", block_table, torch.int32)
    has_shape("seq_lens", seq_lens, block_table.shape[:1])
    has_dtype("seq_lens", seq_lens, torch.int32)
    if sink_blocks < 0:
        refuse("sink_blocks", "must not be negative", sink_blocks)
    is_positive("recent_blocks", recent_blocks)
    is_positive("block_size", block_size)
