"""Which blocks each query of a step attends to, put as rows that a paged attention kernel can run as they are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from omni_kernels.ops.compact_blocks import compact_blocks


@dataclass(frozen=True, slots=True)
class Rows:
    """query_start int32 (R+1), seq_lens int32 (R), block_table int32 (R, MB), and the longest of both in tokens."""

    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    max_query_len: int
    max_seq_len: int


def sink_recent_rows(
    query_start: Tensor,
    seq_lens: Tensor,
    prompt_lens: Tensor,
    block_table: Tensor,
    sink_blocks: int,
    recent_blocks: int,
    block_size: int,
) -> Rows:
    """Rows of a step over S sequences: query_start (S+1), seq_lens, prompt_lens (S), block_table (S, MB), all int32.

    A prompt's tokens but the last attend to everything before them: they stay one row of their sequence, which ends
    where they end. The prompt's last token and every generated one attend to sink and recent blocks only: each is a
    row of one query over a compacted block table. So what a token attends to depends on its position alone, never on
    how the scheduler cut the step: chunked prefill, drafts to verify and sequences computed again after preemption
    come out the same.
    """
    lengths = (query_start[1:] - query_start[:-1]).long()
    if torch.equal(lengths, torch.ones_like(lengths)) and bool((seq_lens >= prompt_lens).all()):
        table, kept = compact_blocks(block_table, seq_lens, sink_blocks, recent_blocks, block_size)
        return Rows(query_start, kept, table.contiguous(), 1, int(kept.max()) if len(kept) else 0)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    offset = torch.arange(len(sequence)) - query_start[:-1].long()[sequence]
    position = (seq_lens.long() - lengths)[sequence] + offset
    is_sparse = position >= prompt_lens.long()[sequence] - 1
    first = torch.nonzero(is_sparse | (offset == 0)).squeeze(1)
    start = torch.cat([first, torch.tensor([len(sequence)])])
    last = start[1:] - 1
    row_lens = (position[last] + 1).to(torch.int32)
    table = block_table[sequence[last]]
    kept_table, kept_lens = compact_blocks(table, row_lens, sink_blocks, recent_blocks, block_size)
    sparse_row = is_sparse[last]
    width = kept_table.shape[1]
    table[:, :width] = torch.where(sparse_row.unsqueeze(1), kept_table, table[:, :width])
    row_lens = torch.where(sparse_row, kept_lens, row_lens)
    return Rows(start.to(torch.int32), row_lens, table, int((start[1:] - start[:-1]).max()), int(row_lens.max()))
