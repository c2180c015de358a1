"""Batches that the attention ops are checked on: decode, prefill, prefill behind a prefix, all at once; torn blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, device

from omni_kernels.case import dtype_name


@dataclass(frozen=True, slots=True)
class Batch:
    """Query rows and tokens of each sequence. Physical blocks lie in no order; unused table entries are -1."""

    name: str
    query_lens: Sequence[int]
    seq_lens: Sequence[int]
    block_size: int

    @property
    def tokens(self) -> int:
        return sum(self.query_lens)

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache: the used ones and two that nobody owns."""
        return 2 + sum(-(-length // self.block_size) for length in self.seq_lens)

    def paging(self, generator: Generator, where: device) -> tuple[Tensor, Tensor, Tensor]:
        """block_table, query_start, seq_lens."""
        used = [-(-length // self.block_size) for length in self.seq_lens]
        table = torch.full((len(used), max(used, default=0) + 1), -1, dtype=torch.int32)
        physical = torch.randperm(self.num_blocks, generator=generator, dtype=torch.int32)
        for row, (blocks, mine) in enumerate(zip(used, physical.split([*used, 2]), strict=False)):
            table[row, :blocks] = mine
        starts = torch.tensor([0, *self.query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        lengths = torch.tensor(self.seq_lens, dtype=torch.int32)
        return table.to(where), starts.to(where), lengths.to(where)


SMALL = (
    Batch("decode", (1, 1, 1, 1), (1, 16, 17, 77), 16),
    Batch("prefill", (5, 33), (5, 33), 16),
    Batch("mixed", (1, 0, 9, 1, 20), (40, 7, 30, 16, 20), 8),
    Batch("none", (), (), 16),
)
"""Small blocks; a sequence without query rows; no sequence at all."""
LARGE = (
    Batch("decode", (1, 1, 1), (1, 128, 301), 128),
    Batch("mixed", (1, 4, 19), (140, 129, 260), 128),
)
"""Blocks of 128 tokens, which the Ascend calls ask for in prefill."""


def tolerances(batch: Batch) -> Sequence[tuple[torch.dtype, float, float]]:
    """dtype, atol, rtol of attention over normally distributed keys and values; float16 over one batch only."""
    half = ((torch.float16, 2e-3, 4e-3),) if batch is LARGE[0] else ()
    return ((torch.float32, 2e-5, 2e-5), (torch.bfloat16, 1e-2, 1.6e-2), *half)


def normal(generator: Generator, where: device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator).to(where, dtype)


def case_name(op: str, model: str, batch: Batch, dtype: torch.dtype) -> str:
    return f"{op}-{model}-{batch.name}-{dtype_name(dtype)}"
