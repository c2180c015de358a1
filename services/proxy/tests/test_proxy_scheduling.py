"""The ledger, the continuation, the settings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_common.errors import InvalidRequest
from omni_proxy.continuation import FirstToken, continuation, first_token_source
from omni_proxy.ledger import Ledger
from omni_proxy.sampling import Sampling
from omni_proxy.scheduling.columns import Columns
from omni_proxy.sequence import OutputLengths
from omni_proxy.settings import Settings


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 99)), max_size=20))
def test_the_ledger_returns_to_zero(charges):
    ledger = Ledger(Columns(), lambda: 0.0)
    with pytest.raises(RuntimeError):
        nest(ledger, charges)
    assert ledger.total_requests == 0
    assert all(ledger.of(w).uncached_tokens == 0 for w in "ab")


def nest(ledger: Ledger, charges: list[tuple[str, int]]) -> None:
    if not charges:
        raise RuntimeError
    worker, uncached = charges[0]
    with ledger.charge(worker, (uncached, 0)):
        assert ledger.of(worker).requests >= 1
        nest(ledger, charges[1:])


@pytest.mark.parametrize(
    ("length", "sampling", "block_size", "source"),
    [
        (9, Sampling(8), 4, FirstToken.PREFILL),
        (9, Sampling(8), None, FirstToken.DECODE_ALONE),
        (8, Sampling(8), 4, FirstToken.FULL_BLOCK),
        (9, Sampling(8, seed=1), 4, FirstToken.SEEDED),
        (9, Sampling(8, seed=1, temperature=0), 4, FirstToken.PREFILL),
        (9, Sampling(8, presence_penalty=1), 4, FirstToken.PENALISED),
        (9, Sampling(8, frequency_penalty=-1), 4, FirstToken.PENALISED),
        (9, Sampling(8, repetition_penalty=1.2), 4, FirstToken.PREFILL),
    ],
)
def test_where_the_first_token_comes_from(length, sampling, block_size, source):
    assert first_token_source(length, sampling, block_size) is source


@pytest.mark.parametrize(("generated", "left", "least"), [([], 8, 2), ([5], 7, 1), ([5, 6, 7], 5, 0)])
def test_continuation_counts_what_is_left(generated, left, least):
    after = continuation([1, 2], generated, Sampling(8, min_tokens=2), FirstToken.PREFILL)
    assert list(after.token_ids) == [1, 2, *generated]
    assert after.num_output_tokens == len(generated)
    assert (after.sampling.max_tokens, after.sampling.min_tokens) == (left, least)


def test_settings_name_what_is_wrong(tmp_path):
    environ = {"OMNI_PROXY_MODEL_DIR": str(tmp_path), "OMNI_PROXY_WORKERS": "[a:1, b:2]"}
    settings = Settings.load(environ)
    assert (settings.workers, settings.model) == (("a:1", "b:2"), tmp_path.name)
    with pytest.raises(InvalidRequest, match="known: cost, earliest_batch, "):
        Settings.load(environ | {"OMNI_PROXY_POLICY": "best"})


def test_a_proxy_that_has_just_started_soon_knows_how_long_answers_are():
    lengths = OutputLengths(first_guess=128)
    assert lengths.expect(10_000) == 128
    for _ in range(24):
        lengths.saw(4000)
    assert lengths.expect(10_000) > 0.7 * 4000
    for _ in range(500):
        lengths.saw(4000)
    lengths.saw(1)
    assert lengths.expect(10_000) > 0.97 * 4000  # one answer tells little
    assert lengths.expect(16) == 16
