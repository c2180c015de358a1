"""Top-k and top-p keep what they say, draws follow the probabilities, verified drafts leave the target as it is."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_kernels.load import kernels_of
from omni_kernels.ops.sampling import SAMPLE, TOP_K_TOP_P
from omni_kernels.ops.speculative import speculative_verify
from omni_kernels.table import one_thread

FEW = settings(max_examples=60, deadline=None)
CPU = kernels_of("cpu")
KEEP = [pytest.param(TOP_K_TOP_P.meaning, id="meaning"), pytest.param(CPU["top_k_top_p"], id="cpu")]
DRAW = [pytest.param(SAMPLE.meaning, id="meaning"), pytest.param(CPU["sample"], id="cpu")]
Kernel = Callable[..., Tensor]


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with one_thread():
        yield


def kept(keep: Kernel, logits: Tensor, k: int, p: float) -> Tensor:
    result = keep(logits[None], torch.tensor([k], dtype=torch.int32), torch.tensor([p]))[0]
    assert torch.equal(result[result > -torch.inf], logits[result > -torch.inf]), "what is kept is left as it was"
    return result > -torch.inf


@pytest.mark.parametrize("keep", KEEP)
@FEW
@given(
    logits=st.lists(st.integers(-40, 40), min_size=1, max_size=30).map(lambda rows: torch.tensor(rows) / 8),
    k=st.integers(-1, 32),
    p=st.floats(0.015625, 1.0, width=16),
)
def test_what_is_kept_is_the_least_that_holds(keep: Kernel, logits: Tensor, k: int, p: float) -> None:
    mask = kept(keep, logits, k, p)
    size = len(logits)
    by_k = logits >= logits.sort(descending=True).values[k - 1] if 0 < k < size else torch.ones(size, dtype=torch.bool)
    assert mask.any()
    assert not (mask & ~by_k).any(), "top-p keeps no more than top-k"
    probs = torch.where(by_k, logits.double(), -torch.inf).softmax(0)
    if (~mask & by_k).any():
        assert probs[mask].min() >= probs[~mask].max(), "nothing left out is likelier than anything kept"
    mass, smallest = float(probs[mask].sum()), float(probs[mask].min())
    assert mass >= p - 1e-5, "what is kept holds p"
    assert mask.sum() == 1 or mass - smallest < p + 1e-5, "and would not without its least likely token"


@pytest.mark.parametrize("keep", KEEP)
def test_edges(keep: Kernel) -> None:
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    assert kept(keep, logits, 2, 1.0).tolist() == [False, True, True, True, False], "equal ones are kept by top-k"
    assert kept(keep, logits, 1, 0.5).tolist() == [False, False, True, True, False], "top-p keeps the higher tokens"
    for off in (0, -1, 5, 6):
        assert kept(keep, logits, off, 1.0).all()
    assert kept(keep, logits, 0, 0.0).sum() == 1


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("spread", [0.0, 0.1, 6.0])
def test_large_vocabularies_flat_and_steep(keep: Kernel, spread: float) -> None:
    logits = spread * torch.randn(20_000, generator=torch.Generator().manual_seed(3))
    mask, probs = kept(keep, logits, 0, 0.9), logits.double().softmax(0)
    assert float(probs[mask].sum()) == pytest.approx(0.9, abs=1e-3 if spread < 1 else 1e-2)
    assert float(probs[mask].sum()) >= 0.9 - 1e-4


def chi_square(observed: Tensor, probs: Tensor) -> float:
    """Distance of counts from what `probs` let expect, in standard deviations (Wilson and Hilferty, 1931)."""
    assert not observed[probs == 0].any(), "what is impossible does not happen"
    possible = probs > 0
    expected = probs[possible].double() * observed.sum()
    freedom = int(possible.sum()) - 1
    statistic = float(((observed[possible] - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


@pytest.mark.parametrize("draw", DRAW)
def test_draws_follow_what_is_kept(draw: Kernel) -> None:
    generator = torch.Generator().manual_seed(7)
    logits, count = torch.randn(12, generator=generator), 20_000
    rows = logits.expand(count, -1).contiguous()
    k, p = torch.full((count,), 8, dtype=torch.int32), torch.full((count,), 0.9)
    tokens = draw(rows, k, p, torch.empty(count, 12).exponential_(generator=generator))
    probs = TOP_K_TOP_P.meaning(rows[:1], k[:1], p[:1])[0].softmax(0)
    assert abs(chi_square(tokens.bincount(minlength=12), probs)) < 4


def verify(count: int, drafts: int, drawn: bool, seed: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Verify `count` times drafts of one wrong drafter: (tokens, accepted, target, offered, draft)."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(drafts + 1, 6, generator=generator).softmax(-1)
    target[0, 2] = 0
    target /= target.sum(-1, keepdim=True)
    offered = target[:drafts] + torch.randn(drafts, 6, generator=generator).mul(1.5).softmax(-1)
    offered[0, 4] = 0
    offered /= offered.sum(-1, keepdim=True)
    noise = torch.empty(count, drafts, 6).exponential_(generator=generator)
    draft = (offered / noise).argmax(-1) if drawn else offered.argmax(-1).expand(count, -1).contiguous()
    tokens, accepted = speculative_verify(
        draft,
        offered.expand(count, -1, -1).contiguous() if drawn else None,
        target.expand(count, -1, -1).contiguous(),
        torch.rand(count, drafts, generator=generator),
        torch.empty(count, 6).exponential_(generator=generator),
    )
    return tokens, accepted, target, offered, draft


@pytest.mark.parametrize("drawn", [True, False])
def test_verified_tokens_are_distributed_as_the_target(drawn: bool) -> None:
    tokens, accepted, target, _, _ = verify(20_000, 2, drawn)
    assert abs(chi_square(tokens[:, 0].bincount(minlength=6), target[0])) < 4
    for place in (1, 2):  # where a token stands at all: the ones before it were accepted
        there = tokens[accepted >= place, place]
        assert len(there) > 1000
        assert abs(chi_square(there.bincount(minlength=6), target[place])) < 4


def test_drafts_are_accepted_as_often_as_the_distributions_overlap() -> None:
    _, accepted, target, offered, _ = verify(20_000, 1, True)
    overlap = float(torch.minimum(target[0], offered[0]).sum())
    deviation = math.sqrt(overlap * (1 - overlap) / 20_000)
    assert abs(float(accepted.double().mean()) - overlap) < 4 * deviation


def test_a_drafter_that_is_the_model_is_always_accepted() -> None:
    target = torch.randn(50, 4, 9, generator=torch.Generator().manual_seed(1)).softmax(-1)
    offered = target[:, :3].contiguous()
    draft = offered.flatten(0, 1).multinomial(1, generator=torch.Generator().manual_seed(2)).view(50, 3)
    tokens, accepted = speculative_verify(draft, offered, target, torch.rand(50, 3), torch.ones(50, 9))
    assert (accepted == 3).all()
    assert torch.equal(tokens[:, :3], draft)


def test_tokens_are_the_accepted_drafts_one_more_and_padding() -> None:
    tokens, accepted, _, _, draft = verify(500, 3, True)
    assert set(accepted.tolist()) == {0, 1, 2, 3}
    for row, count, drafted in zip(tokens.tolist(), accepted.tolist(), draft.tolist(), strict=True):
        assert row[:count] == drafted[:count]
        assert 0 <= row[count] < 6
        assert row[count + 1 :] == [-1] * (3 - count)


def test_greedy_targets_accept_their_own_choice_only() -> None:
    target = torch.nn.functional.one_hot(torch.tensor([[3, 1, 4], [3, 1, 4], [3, 1, 4]]), 5).float()
    draft = torch.tensor([[3, 1], [3, 2], [0, -1]])
    noise = torch.empty(3, 5).exponential_(generator=torch.Generator().manual_seed(0))
    tokens, accepted = speculative_verify(draft, None, target, torch.rand(3, 2), noise)
    assert tokens.tolist() == [[3, 1, 4], [3, 1, -1], [3, -1, -1]]
    assert accepted.tolist() == [2, 1, 0]


def test_fewer_drafts_than_places_end_with_a_draw_from_the_target() -> None:
    target = torch.nn.functional.one_hot(torch.tensor([[3, 1, 4]]), 5).float()
    tokens, accepted = speculative_verify(torch.tensor([[3, -1]]), None, target, torch.zeros(1, 2), torch.ones(1, 5))
    assert tokens.tolist() == [[3, 1, -1]]
    assert accepted.tolist() == [1]
