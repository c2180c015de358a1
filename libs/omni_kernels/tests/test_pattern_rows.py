"""Rows of a step under a pattern: paged attention over them is attention by position, however the step was cut."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_kernels.ops.paged_attention import paged_attention
from omni_kernels.vllm.omni_attn.rows import sink_recent_rows

BLOCK, HEADS, SIZE = 4, 2, 8


@st.composite
def sequences(draw: st.DrawFn) -> tuple[int, int, int]:
    """Prompt length, tokens computed before the step, tokens of the step: prefill chunks, decode, drafts, replays."""
    prompt = draw(st.integers(1, 40))
    computed = draw(st.integers(0, 60))
    return prompt, computed, draw(st.integers(1, 20))


@given(st.lists(sequences(), min_size=1, max_size=4), st.integers(0, 2), st.integers(1, 3), st.integers(0, 1 << 16))
@settings(max_examples=30, deadline=None)
def test_rows_attend_by_position_alone(batch: list[tuple[int, int, int]], sink: int, recent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = 20
    table = (torch.randperm(len(batch) * width, generator=generator) + 1).to(torch.int32).view(len(batch), width)
    keys, values = (torch.randn(len(batch) * width + 1, BLOCK, HEADS, SIZE, generator=generator) for _ in range(2))
    lengths = torch.tensor([new for _, _, new in batch])
    query_start = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)
    seq_lens = torch.tensor([computed + new for _, computed, new in batch], dtype=torch.int32)
    prompts = torch.tensor([prompt for prompt, _, _ in batch], dtype=torch.int32)
    query = torch.randn(int(lengths.sum()), HEADS, SIZE, generator=generator)

    rows = sink_recent_rows(query_start, seq_lens, prompts, table, sink, recent, BLOCK)
    seen = paged_attention(query, keys, values, rows.block_table, rows.query_start, rows.seq_lens, 0.3)

    for n, (prompt, computed, new) in enumerate(batch):
        position, here = torch.arange(computed, computed + new).unsqueeze(1), torch.arange(computed + new)
        kept = (here // BLOCK < sink) | (here // BLOCK > position // BLOCK - recent)
        allowed = (here <= position) & (kept | (position < prompt - 1))
        held = table[n, here // BLOCK].long(), here % BLOCK
        own = slice(int(query_start[n]), int(query_start[n + 1]))
        scores = torch.einsum("qhd,thd->hqt", query[own], keys[held]) * 0.3
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(2)
        expected = torch.einsum("hqt,thd->qhd", weights, values[held])
        torch.testing.assert_close(seen[own], expected, atol=1e-5, rtol=1e-4)
    assert rows.max_query_len == int((rows.query_start[1:] - rows.query_start[:-1]).max())
    assert rows.max_seq_len == int(rows.seq_lens.max())


def test_a_decode_step_reads_no_more_than_the_budget() -> None:
    seq_lens = torch.tensor([5, 1000, 4097], dtype=torch.int32)
    table = torch.arange(3 * 2000, dtype=torch.int32).view(3, 2000)
    rows = sink_recent_rows(torch.arange(4, dtype=torch.int32), seq_lens, seq_lens - 1, table, 1, 2, BLOCK)
    assert rows.block_table.shape == (3, 3)
    assert rows.seq_lens.tolist() == [5, 12, 9]
    assert rows.block_table[2].tolist() == [4000, 4000 + 1023, 4000 + 1024]
