"""Batches for the attention tests: random lengths and blocks, caches poisoned where nobody may read."""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from omni_kernels.ops.paged_samples import Batch

CPU = torch.device("cpu")
POISON = float("nan")


@st.composite
def ragged(draw: st.DrawFn, most: int = 4) -> Batch:
    """Decode rows, prompts, prompts behind a prefix and sequences without rows, over blocks of odd sizes."""
    rows = draw(st.lists(st.sampled_from([1, 1, 0, 2, 7]), max_size=most))
    lengths = [row + draw(st.integers(0, 40)) for row in rows]
    return Batch("drawn", rows, lengths, draw(st.sampled_from([1, 3, 8, 16])))


@dataclass(frozen=True)
class Paged:
    """`batch` laid out: its paging tensors, and where each token lies."""

    batch: Batch
    block_table: Tensor
    query_start: Tensor
    seq_lens: Tensor

    @classmethod
    def of(cls, batch: Batch, seed: int) -> "Paged":
        return cls(batch, *batch.paging(torch.Generator().manual_seed(seed), CPU))

    @property
    def paging(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.block_table, self.query_start, self.seq_lens

    def slots(self, row: int) -> tuple[Tensor, Tensor]:
        """(block, row in it) of every position of sequence `row`."""
        p = torch.arange(self.batch.seq_lens[row])
        return self.block_table[row].long()[p // self.batch.block_size], p % self.batch.block_size

    def cache(self, tokens: list[Tensor]) -> Tensor:
        """A cache with `tokens`, (length, ...) for each sequence, poison everywhere else."""
        shape = tokens[0].shape[1:] if tokens else (1, 4)
        cache = torch.full((self.batch.num_blocks, self.batch.block_size, *shape), POISON, dtype=tokens[0].dtype)
        for row, mine in enumerate(tokens):
            cache[self.slots(row)] = mine
        return cache

    def rows(self, row: int) -> slice:
        first, last = self.query_start[row : row + 2].tolist()
        return slice(first, last)

    def positions(self, row: int) -> Tensor:
        """Of the query rows of sequence `row`."""
        return torch.arange(self.batch.seq_lens[row] - self.batch.query_lens[row], self.batch.seq_lens[row])

    def with_lengths(self, block_table: Tensor, seq_lens: Tensor) -> "Paged":
        return replace(self, block_table=block_table, seq_lens=seq_lens)


def masked(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float) -> Tensor:
    """torch's own attention in float64 of q (Q, Hq, D) over keys, values (L, Hkv, D) where `seen` (Q, L)."""
    group = q.shape[1] // keys.shape[1]
    heads = [
        x.double().transpose(0, 1) for x in (q, keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1))
    ]
    attended = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale)
    return attended.transpose(0, 1)
