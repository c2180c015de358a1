"""Latent attention: the absorbed form is DeepSeek-V2's own, and the sparse one is the full one where it sees all."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from omni_kernels.ops.mla_attention import mla_attention
from omni_kernels.ops.paged_samples import Batch
from omni_kernels.ops.sparse_attention import indexer_top_k, sparse_mla_attention

sys.path.insert(0, str(Path(__file__).parent))
from paged_batches import Paged, masked, ragged

EXAMPLES = settings(deadline=None, max_examples=40)
HEADS, RANK, ROPE = 4, 12, 4
SCALE = 0.3


def drawn(paged: Paged, seed: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """q_latent, q_rope, and what each sequence has in the cache."""
    generator = torch.Generator().manual_seed(seed)
    tokens = paged.batch.tokens
    q_latent, q_rope = (torch.randn(tokens, HEADS, size, generator=generator) for size in (RANK, ROPE))
    return q_latent, q_rope, [torch.randn(n, RANK + ROPE, generator=generator) for n in paged.batch.seq_lens]


def close(result: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(result.double(), wanted.double(), atol=1e-5, rtol=1e-5)


@EXAMPLES
@given(batch=ragged().filter(lambda b: b.seq_lens), seed=st.integers(0, 99))
def test_the_absorbed_form_is_the_naive_one(batch: Batch, seed: int) -> None:
    """Keys and values of every head projected up from the latents, as the paper states it, with random matrices."""
    paged = Paged.of(batch, seed)
    _, q_rope, tokens = drawn(paged, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    size, value_size = 6, 5
    q_nope = torch.randn(batch.tokens, HEADS, size, generator=generator)
    key_up = torch.randn(HEADS, size, RANK, generator=generator) / RANK**0.5
    value_up = torch.randn(HEADS, value_size, RANK, generator=generator) / RANK**0.5

    q_latent = torch.einsum("thd,hdr->thr", q_nope, key_up).contiguous()
    attended = mla_attention(q_latent, q_rope, paged.cache(tokens), *paged.paging, SCALE)
    result = torch.einsum("thr,hvr->thv", attended, value_up)

    q = torch.cat((q_nope, q_rope), -1)
    for row, mine in enumerate(tokens):
        latents, ropes = mine.split((RANK, ROPE), -1)
        keys = torch.cat((torch.einsum("lr,hdr->lhd", latents, key_up), ropes[:, None].expand(-1, HEADS, -1)), -1)
        values = torch.einsum("lr,hvr->lhv", latents, value_up)
        seen = torch.arange(len(mine)) <= paged.positions(row).unsqueeze(1)
        close(result[paged.rows(row)], masked(q[paged.rows(row)], keys, values, seen, SCALE))


@EXAMPLES
@given(batch=ragged().filter(lambda b: b.seq_lens), seed=st.integers(0, 99), most=st.integers(1, 60))
def test_the_indexer_finds_the_best_positions_in_order(batch: Batch, seed: int, most: int) -> None:
    """Whole numbers, so that scores are exact and many are equal: the lower position goes first."""
    paged = Paged.of(batch, seed)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-2, 3, (batch.tokens, 3, 4), generator=generator).float()
    weights = torch.randint(-1, 3, (batch.tokens, 3), generator=generator).float()
    keys = [torch.randint(-1, 2, (n, 4), generator=generator).float() for n in batch.seq_lens]
    found = indexer_top_k(q, weights, paged.cache(keys), *paged.paging, most)
    assert found.dtype is torch.int32
    for row, mine in enumerate(keys):
        rows = range(batch.tokens)[paged.rows(row)]
        for i, t in zip(rows, paged.positions(row).tolist(), strict=True):
            scores = (weights[i, :, None] * torch.relu(q[i] @ mine[: t + 1].T)).sum(0).tolist()
            wanted = sorted(range(t + 1), key=lambda p: (-scores[p], p))[:most]
            assert found[i].tolist() == wanted + [-1] * (most - len(wanted))


@EXAMPLES
@given(batch=ragged().filter(lambda b: b.tokens), seed=st.integers(0, 99))
def test_sparse_attention_to_all_that_the_indexer_gives_is_full_attention(batch: Batch, seed: int) -> None:
    paged = Paged.of(batch, seed)
    q_latent, q_rope, tokens = drawn(paged, seed)
    cache = paged.cache(tokens)
    index_keys = paged.cache([mine[:, :4] for mine in tokens])
    weights = torch.rand(batch.tokens, HEADS, generator=torch.Generator().manual_seed(seed))
    positions = indexer_top_k(q_latent[..., :4].contiguous(), weights, index_keys, *paged.paging, max(batch.seq_lens))
    close(
        sparse_mla_attention(q_latent, q_rope, cache, *paged.paging, positions, SCALE),
        mla_attention(q_latent, q_rope, cache, *paged.paging, SCALE),
    )


@EXAMPLES
@given(batch=ragged().filter(lambda b: b.tokens), seed=st.integers(0, 99), most=st.integers(1, 20))
def test_sparse_attention_sees_the_given_positions_in_any_order_and_no_others(
    batch: Batch, seed: int, most: int
) -> None:
    """Tokens that no row is given are poison."""
    paged = Paged.of(batch, seed)
    q_latent, q_rope, tokens = drawn(paged, seed)
    generator = torch.Generator().manual_seed(seed)
    positions = torch.full((batch.tokens, most), -1, dtype=torch.int32)
    wanted = torch.empty(q_latent.shape, dtype=torch.float64)
    q = torch.cat((q_latent, q_rope), -1)
    for row, mine in enumerate(tokens):
        given_to_any = torch.zeros(len(mine), dtype=torch.bool)
        rows = range(batch.tokens)[paged.rows(row)]
        for i, t in zip(rows, paged.positions(row).tolist(), strict=True):
            chosen = torch.randperm(t + 1, generator=generator)[:most]
            positions[i, : len(chosen)] = chosen
            given_to_any[chosen] = True
            seen = torch.zeros(1, len(mine), dtype=torch.bool).index_fill_(1, chosen, True)
            wanted[i] = masked(q[i : i + 1], mine[:, None], mine[:, None, :RANK], seen, SCALE)
        mine[~given_to_any] = float("nan")
    close(sparse_mla_attention(q_latent, q_rope, paged.cache(tokens), *paged.paging, positions, SCALE), wanted)


def test_where_blocks_lie_changes_nothing() -> None:
    batch = Batch("mixed", (1, 9, 20), (40, 30, 20), 8)
    q_latent, q_rope, tokens = drawn(Paged.of(batch, 0), 0)
    weights = torch.rand(batch.tokens, HEADS, generator=torch.Generator().manual_seed(0))
    results = []
    for placed in (Paged.of(batch, seed) for seed in range(3)):
        latents = (q_latent, q_rope, placed.cache(tokens), *placed.paging)
        index_keys = placed.cache([mine[:, :RANK] for mine in tokens])
        positions = indexer_top_k(q_latent, weights, index_keys, *placed.paging, 6)
        results.append((mla_attention(*latents, SCALE), positions, sparse_mla_attention(*latents, positions, SCALE)))
    for others in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(results[0], others, strict=True))


def test_long_prompts_in_pieces_equal_the_prompt_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    paged = Paged.of(Batch("prompt", (23, 40), (60, 40), 8), 0)
    q_latent, q_rope, tokens = drawn(paged, 0)
    latents = (q_latent, q_rope, paged.cache(tokens), *paged.paging)
    keys = paged.cache([mine[:, :RANK] for mine in tokens])
    weights = torch.rand(paged.batch.tokens, HEADS, generator=torch.Generator().manual_seed(0))

    def run() -> tuple[Tensor, Tensor, Tensor]:
        positions = indexer_top_k(q_latent, weights, keys, *paged.paging, 9)
        return mla_attention(*latents, SCALE), positions, sparse_mla_attention(*latents, positions, SCALE)

    whole = run()
    monkeypatch.setattr("omni_kernels.ops.paging._SCORES", 7 * 60 * HEADS)
    monkeypatch.setattr("omni_kernels.ops.sparse_attention._GATHERED", 7 * 9 * (RANK + ROPE + HEADS))
    for left, right in zip(run(), whole, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def _latents() -> dict[str, object]:
    paged = Paged.of(Batch("mixed", (1, 2), (9, 3), 4), 0)
    q_latent, q_rope, tokens = drawn(paged, 0)
    table, starts, lengths = paged.paging
    return {
        "q_latent": q_latent, "q_rope": q_rope, "cache": paged.cache(tokens), "block_table": table,
        "query_start": starts, "seq_lens": lengths, "scale": SCALE,
    }  # fmt: skip


def _sparse() -> dict[str, object]:
    return {**_latents(), "positions": _positions([8, 3], [1, -1], [0, 2])}


def _indexer() -> dict[str, object]:
    given = _latents()
    paging = {name: given[name] for name in ("block_table", "query_start", "seq_lens")}
    return {
        "q": given["q_latent"],
        "weights": torch.ones(3, HEADS),
        "key_cache": torch.ones(7, 4, RANK),
        **paging,
        "top_k": 2,
    }


def _positions(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


WRONG: dict[str, tuple[Callable[..., Tensor], Callable[[], dict[str, object]], str, object]] = {
    "latents in float64": (mla_attention, _latents, "q_latent", torch.ones(3, HEADS, RANK, dtype=torch.float64)),
    "rope of other heads": (mla_attention, _latents, "q_rope", torch.ones(3, 2, ROPE)),
    "rope in bfloat16": (mla_attention, _latents, "cache", {"q_rope": torch.ones(3, HEADS, ROPE).bfloat16()}),
    "rows of another size": (mla_attention, _latents, "cache", torch.ones(7, 4, RANK + ROPE + 1)),
    "a cache with heads": (mla_attention, _latents, "cache", torch.ones(7, 4, 1, RANK + ROPE)),
    "no heads": (mla_attention, _latents, "q_latent", torch.ones(3, 0, RANK)),
    "scale below 0": (mla_attention, _latents, "scale", -1.0),
    "positions in int64": (sparse_mla_attention, _sparse, "positions", torch.zeros(3, 2, dtype=torch.int64)),
    "positions for other rows": (sparse_mla_attention, _sparse, "positions", _positions([0, 1])),
    "positions ahead of the query": (sparse_mla_attention, _sparse, "positions", _positions([0, 1], [2, -1], [0, 1])),
    "a row without positions": (sparse_mla_attention, _sparse, "positions", _positions([0, 1], [-1, -1], [0, 1])),
    "-1 before a position": (sparse_mla_attention, _sparse, "positions", _positions([-1, 1], [0, 1], [0, 1])),
    "no columns": (sparse_mla_attention, _sparse, "positions", torch.zeros(3, 0, dtype=torch.int32)),
    "below -1": (sparse_mla_attention, _sparse, "positions", _positions([1, -2], [0, 1], [0, 1])),
    "weights in bfloat16": (indexer_top_k, _indexer, "weights", torch.ones(3, HEADS).bfloat16()),
    "weights of other heads": (indexer_top_k, _indexer, "weights", torch.ones(3, HEADS + 1)),
    "keys of another size": (indexer_top_k, _indexer, "key_cache", torch.ones(7, 4, RANK - 1)),
    "top_k 0": (indexer_top_k, _indexer, "top_k", 0),
}


@pytest.mark.parametrize(("op", "valid", "named", "wrong"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_refused_by_name(
    op: Callable[..., Tensor], valid: Callable[[], dict[str, object]], named: str, wrong: object
) -> None:
    op(**valid())
    with pytest.raises(ValueError, match=f"^{named}: "):
        op(**{**valid(), **(wrong if isinstance(wrong, dict) else {named: wrong})})


@pytest.mark.parametrize(("op", "valid"), [(mla_attention, _latents), (sparse_mla_attention, _sparse)])
def test_unknown_values_are_not_read_while_tracing(
    op: Callable[..., Tensor], valid: Callable[[], dict[str, object]]
) -> None:
    with FakeTensorMode() as fake:
        arguments = {k: fake.from_tensor(v) if isinstance(v, Tensor) else v for k, v in valid().items()}
        assert op(**arguments).shape == (3, HEADS, RANK)
