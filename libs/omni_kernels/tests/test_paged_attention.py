"""Paged attention, full and to sink and recent tokens: equal to torch's own attention with an explicit mask."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from omni_kernels.backends.cpu import paged_attention as cpu
from omni_kernels.ops.compact_blocks import compact_blocks
from omni_kernels.ops.paged_attention import PAGED_ATTENTION, paged_attention
from omni_kernels.ops.paged_samples import Batch
from omni_kernels.ops.sink_recent_attention import SINK_RECENT_ATTENTION, sink_recent_attention

sys.path.insert(0, str(Path(__file__).parent))
from paged_batches import Paged, masked, ragged

Kernel = Callable[..., Tensor]
FULL = [
    pytest.param(PAGED_ATTENTION.meaning, id="meaning"),
    pytest.param(cpu.KERNELS["paged_attention"], id="cpu"),
]
SPARSE = [
    pytest.param(SINK_RECENT_ATTENTION.meaning, id="meaning"),
    pytest.param(cpu.KERNELS["sink_recent_attention"], id="cpu"),
]
EXAMPLES = settings(deadline=None, max_examples=40)
HEADS, KV_HEADS, SIZE, VALUE_SIZE = 6, 2, 8, 8
SCALE = 0.4


def drawn(paged: Paged, seed: int, value_size: int = VALUE_SIZE) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Queries, and keys and values of each sequence, float32."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(paged.batch.tokens, HEADS, SIZE, generator=generator)
    keys = [torch.randn(n, KV_HEADS, SIZE, generator=generator) for n in paged.batch.seq_lens]
    values = [torch.randn(n, KV_HEADS, value_size, generator=generator) for n in paged.batch.seq_lens]
    return q, keys, values


def expected(
    paged: Paged, q: Tensor, keys: list[Tensor], values: list[Tensor], seen: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`seen(p, t)` says which positions p a query at t sees; both broadcast."""
    out = torch.empty(*q.shape[:2], values[0].shape[-1], dtype=torch.float64)
    for row, (mine, theirs) in enumerate(zip(keys, values, strict=True)):
        t = paged.positions(row).unsqueeze(1)
        out[paged.rows(row)] = masked(q[paged.rows(row)], mine, theirs, seen(torch.arange(len(mine)), t), SCALE)
    return out


def close(result: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(result.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", FULL)
@EXAMPLES
@given(batch=ragged().filter(lambda b: b.seq_lens), seed=st.integers(0, 99), value_size=st.sampled_from([8, 5]))
def test_every_row_attends_up_to_itself(kernel: Kernel, batch: Batch, seed: int, value_size: int) -> None:
    """Poison fills what no sequence owns, and the tail of each last block."""
    paged = Paged.of(batch, seed)
    q, keys, values = drawn(paged, seed, value_size)
    result = kernel(q, paged.cache(keys), paged.cache(values), *paged.paging, SCALE)
    close(result, expected(paged, q, keys, values, lambda p, t: p <= t))


@pytest.mark.parametrize("kernel", FULL)
def test_where_blocks_lie_changes_nothing(kernel: Kernel) -> None:
    batch = Batch("mixed", (1, 9, 20), (40, 30, 20), 8)
    q, keys, values = drawn(Paged.of(batch, 0), 0)
    results = [
        kernel(q, placed.cache(keys), placed.cache(values), *placed.paging, SCALE)
        for placed in (Paged.of(batch, seed) for seed in range(3))
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("kernel", FULL)
def test_caches_may_be_views_of_one_that_holds_keys_beside_values_by_head(kernel: Kernel) -> None:
    paged = Paged.of(Batch("mixed", (1, 9, 20), (40, 30, 20), 8), 0)
    q, keys, values = drawn(paged, 0)
    apart = paged.cache(keys), paged.cache(values)
    by_head = torch.cat(apart, -1).transpose(1, 2).contiguous().transpose(1, 2)
    views = by_head[..., :SIZE], by_head[..., SIZE:]
    torch.testing.assert_close(
        kernel(q, *views, *paged.paging, SCALE), kernel(q, *apart, *paged.paging, SCALE), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("kernel", FULL)
def test_a_long_prompt_in_pieces_equals_the_prompt_at_once(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanings and kernels bound what they hold at a time; the bound must not show."""
    paged = Paged.of(Batch("prompt", (23, 40), (60, 40), 8), 0)
    q, keys, values = drawn(paged, 0)
    arguments = (q, paged.cache(keys), paged.cache(values), *paged.paging, SCALE)
    whole = kernel(*arguments)
    monkeypatch.setattr("omni_kernels.ops.paging._SCORES", 7 * 60 * HEADS)
    monkeypatch.setattr(cpu, "_MASKED", 7 * 60)
    torch.testing.assert_close(kernel(*arguments), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", SPARSE)
@EXAMPLES
@given(
    batch=ragged().filter(lambda b: b.seq_lens),
    seed=st.integers(0, 99),
    sink=st.integers(0, 20),
    recent=st.integers(0, 30),
)
def test_sink_and_recent_tokens_are_seen_and_no_others(
    kernel: Kernel, batch: Batch, seed: int, sink: int, recent: int
) -> None:
    """Poison fills every token that no row of its sequence sees: the cost is that of the kept tokens."""
    if sink == recent == 0:
        recent = 1
    paged = Paged.of(batch, seed)
    q, keys, values = drawn(paged, seed)

    def seen(p: Tensor, t: Tensor) -> Tensor:
        return (p <= t) & ((p < sink) | (p > t - recent))

    wanted = expected(paged, q, keys, values, seen)
    for row, length in enumerate(batch.seq_lens):
        unseen = ~seen(torch.arange(length), paged.positions(row).unsqueeze(1)).any(0)
        keys[row][unseen] = values[row][unseen] = float("nan")
    result = kernel(q, paged.cache(keys), paged.cache(values), *paged.paging, SCALE, sink, recent)
    close(result, wanted)


@pytest.mark.parametrize("kernel", SPARSE)
@pytest.mark.parametrize(("sink", "recent"), [(0, 60), (20, 40), (60, 0), (100, 100)])
def test_sink_and_recent_that_cover_a_sequence_are_full_attention(kernel: Kernel, sink: int, recent: int) -> None:
    paged = Paged.of(Batch("mixed", (1, 9, 20), (60, 30, 20), 8), 0)
    q, keys, values = drawn(paged, 0)
    arguments = (q, paged.cache(keys), paged.cache(values), *paged.paging, SCALE)
    torch.testing.assert_close(
        kernel(*arguments, sink, recent), PAGED_ATTENTION.meaning(*arguments), atol=1e-5, rtol=1e-5
    )


@EXAMPLES
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    block_size=st.sampled_from([1, 4, 8]),
    sink_blocks=st.integers(0, 3),
    recent_blocks=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_decode_over_compacted_blocks_sees_the_kept_blocks_and_no_others(
    lengths: list[int], block_size: int, sink_blocks: int, recent_blocks: int, seed: int
) -> None:
    paged = Paged.of(Batch("decode", [1] * len(lengths), lengths, block_size), seed)
    q, keys, values = drawn(paged, seed)

    def seen(p: Tensor, t: Tensor) -> Tensor:
        blocks = t // block_size + 1
        return (p < sink_blocks * block_size) | (p >= (blocks - recent_blocks) * block_size)

    wanted = expected(paged, q, keys, values, seen)
    for row, length in enumerate(lengths):
        dropped = ~seen(torch.arange(length), paged.positions(row))
        keys[row][dropped] = values[row][dropped] = float("nan")
    caches = paged.cache(keys), paged.cache(values)
    table, kept = compact_blocks(paged.block_table, paged.seq_lens, sink_blocks, recent_blocks, block_size)
    assert table.shape[1] <= sink_blocks + recent_blocks
    close(paged_attention(q, *caches, table, paged.query_start, kept, SCALE), wanted)

    for row, length in enumerate(lengths):  # the same, said to sink_recent_attention row by row
        recent = length - max(0, -(-length // block_size) - recent_blocks) * block_size
        one = (paged.block_table[row : row + 1], paged.query_start[:2], paged.seq_lens[row : row + 1])
        close(
            sink_recent_attention(q[row : row + 1], *caches, *one, SCALE, sink_blocks * block_size, recent),
            wanted[row : row + 1],
        )


def test_compacting_keeps_the_table_of_short_sequences_and_the_dtype() -> None:
    table = torch.tensor([[5, 3, 9, 7], [4, -1, -1, -1], [8, 2, 6, -1]], dtype=torch.int32)
    lengths = torch.tensor([13, 2, 12], dtype=torch.int32)
    compacted, kept = compact_blocks(table, lengths, 1, 2, 4)
    assert compacted.dtype == kept.dtype == torch.int32
    assert compacted.tolist() == [[5, 9, 7], [4, -1, -1], [8, 2, 6]]
    assert kept.tolist() == [9, 2, 12]


def _valid() -> dict[str, object]:
    paged = Paged.of(Batch("mixed", (1, 3), (9, 3), 4), 0)
    q, keys, values = drawn(paged, 0)
    table, starts, lengths = paged.paging
    return {
        "q": q, "key_cache": paged.cache(keys), "value_cache": paged.cache(values), "block_table": table,
        "query_start": starts, "seq_lens": lengths, "scale": SCALE,
    }  # fmt: skip


def _int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


WRONG = {
    "q of two dimensions": ("q", torch.ones(4, 8)),
    "q of another dtype": ("key_cache", {"q": torch.ones(4, 6, 8, dtype=torch.bfloat16)}),
    "q of integers": ("q", torch.ones(4, 6, 8, dtype=torch.int32)),
    "q with gaps": ("q", torch.ones(4, 8, 6).transpose(1, 2)),
    "heads that do not divide": ("q", torch.ones(4, 5, 8)),
    "another head size": ("key_cache", {"q": torch.ones(4, 6, 4)}),
    "keys of three dimensions": ("key_cache", torch.ones(6, 4, 8)),
    "keys that are strided inside": ("key_cache", torch.ones(6, 4, 8, 2).transpose(2, 3)),
    "values in other blocks": ("value_cache", torch.ones(6, 8, 2, 8)),
    "a table in int64": ("block_table", torch.zeros(2, 4, dtype=torch.int64)),
    "a table that is too narrow": ("block_table", _int32(0, 0).unsqueeze(1)),
    "a block beyond the cache": ("block_table", _int32(0, 1, 99, 0, 2, 0, 0, 0).view(2, 4)),
    "a used block of -1": ("block_table", _int32(0, -1, 1, 0, 2, 0, 0, 0).view(2, 4)),
    "starts of another length": ("query_start", _int32(0, 4)),
    "starts that fall": ("query_start", _int32(0, 5, 4)),
    "starts behind 0": ("query_start", _int32(1, 1, 4)),
    "starts short of the rows": ("query_start", _int32(0, 1, 3)),
    "lengths of another number": ("seq_lens", _int32(9)),
    "a length below the rows": ("seq_lens", _int32(9, 2)),
    "lengths in int64": ("seq_lens", torch.tensor([9, 3])),
    "scale 0": ("scale", 0.0),
    "scale that is no number": ("scale", float("nan")),
}


@pytest.mark.parametrize(("named", "wrong"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_refused_by_name(named: str, wrong: object) -> None:
    arguments = {**_valid(), **(wrong if isinstance(wrong, dict) else {named: wrong})}
    with pytest.raises(ValueError, match=f"^{named}: "):
        paged_attention(**arguments)


@pytest.mark.parametrize(("named", "sink", "recent"), [("sink", -1, 4), ("recent", 4, -1), ("recent", 0, 0)])
def test_sink_and_recent_are_refused_by_name(named: str, sink: int, recent: int) -> None:
    with pytest.raises(ValueError, match=f"^{named}: "):
        sink_recent_attention(**_valid(), sink=sink, recent=recent)


@pytest.mark.parametrize(
    ("named", "sink_blocks", "recent_blocks", "block_size"),
    [("sink_blocks", -1, 1, 4), ("recent_blocks", 1, 0, 4), ("block_size", 1, 1, 0)],
)
def test_compacting_refuses_by_name(named: str, sink_blocks: int, recent_blocks: int, block_size: int) -> None:
    table, lengths = _valid()["block_table"], _valid()["seq_lens"]
    with pytest.raises(ValueError, match=f"^{named}: "):
        compact_blocks(table, lengths, sink_blocks, recent_blocks, block_size)


def test_a_valid_call_is_not_refused() -> None:
    assert not paged_attention(**_valid()).isnan().any()


@pytest.mark.parametrize(("op", "more"), [(paged_attention, ()), (sink_recent_attention, (3, 2))])
def test_unknown_values_are_not_read_while_tracing(op: Kernel, more: tuple[int, ...]) -> None:
    """Under fake tensors nobody knows lengths and blocks; shapes come out, and no validator asks for more."""
    with FakeTensorMode() as fake:
        arguments = [fake.from_tensor(v) if isinstance(v, Tensor) else v for v in _valid().values()]
        assert op(*arguments, *more).shape == (4, HEADS, VALUE_SIZE)
