"""The choice of workers, the ledger, the continuation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_common.errors import InvalidRequest, Unavailable
from omni_proxy.continuation import FirstToken, continuation, first_token_source
from omni_proxy.ledger import Ledger
from omni_proxy.ports import KvHandle
from omni_proxy.sampling import Sampling
from omni_proxy.scheduling.policy import POLICIES, Candidate, SchedulingRequest
from omni_proxy.settings import Settings


def p(name: str, **state: int) -> Candidate:
    return Candidate(name, prefills=True, decodes=False, kv_connector="c", **state)


def d(name: str, **state: int) -> Candidate:
    return Candidate(name, prefills=False, decodes=True, kv_connector="c", **state)


@pytest.mark.parametrize(
    ("fleet", "chosen", "reason"),
    [
        pytest.param([p("p1"), d("d1")], ("p1", "d1"), "disaggregated", id="pair"),
        pytest.param([d("d1")], (None, "d1"), "no_prefill_worker", id="decode alone"),
        pytest.param([p("p1", own_uncached_tokens=50), p("p2"), d("d1")], ("p2", "d1"), "disaggregated", id="ledger"),
        pytest.param([p("p1", queued_tokens=50), p("p2"), d("d1")], ("p2", "d1"), "disaggregated", id="stats"),
        pytest.param([p("p1"), p("p2", cached_tokens=64), d("d1")], ("p2", "d1"), "disaggregated", id="prefix"),
        pytest.param(
            [p("p1"), p("p2", cached_tokens=64, queued_tokens=90), d("d1")], ("p1", "d1"), "disaggregated", id="queue"
        ),
        pytest.param(
            [p("p1", cached_tokens=96, expected_tokens=96, own_uncached_tokens=100), p("p2"), d("d1")],
            ("p1", "d1"),
            "disaggregated",
            id="the prefix is on its way",
        ),
        pytest.param(
            [p("p1", cached_tokens=96, expected_tokens=96, own_uncached_tokens=200), p("p2"), d("d1")],
            ("p2", "d1"),
            "disaggregated",
            id="the prefix is on its way behind other work",
        ),
        pytest.param(
            [p("p1"), p("p2", loadable_tokens=64, own_requests=3), d("d1")],
            ("p2", "d1"),
            "disaggregated",
            id="loadable",
        ),
        pytest.param(
            [p("p1", loadable_tokens=64, load_ms=9), p("p2", loadable_tokens=64, load_ms=8), d("d1")],
            ("p2", "d1"),
            "disaggregated",
            id="loaded sooner",
        ),
        pytest.param([p("p1"), d("d1", running=3), d("d2", running=1)], ("p1", "d2"), "disaggregated", id="running"),
        pytest.param([p("p1"), d("d1", own_requests=1), d("d2")], ("p1", "d2"), "disaggregated", id="own running"),
        pytest.param([p("p1"), d("d1", cached_tokens=95)], (None, "d1"), "uncached_part_short", id="short"),
        pytest.param(
            [p("p1"), Candidate("d1", False, True, "other")], (None, "d1"), "no_common_connector", id="connector"
        ),
        pytest.param(
            [p("p1"), Candidate("d1", False, True, "other"), d("d2", running=9)],
            ("p1", "d2"),
            "disaggregated",
            id="pairable decode",
        ),
    ],
)
def test_least_uncached_tokens(fleet, chosen, reason):
    policy = POLICIES["least_uncached_tokens"](10)
    decision = policy.choose(SchedulingRequest(prompt_tokens=100), fleet)
    assert ((decision.prefill, decision.decode), decision.reason) == (chosen, reason)
    assert set(decision.decode_costs) == {c.worker_id for c in fleet if c.decodes}
    assert set(decision.prefill_costs) == {c.worker_id for c in fleet if c.prefills}
    for cost in decision.prefill_costs.values():
        assert cost.parts.keys() == {"own", "ahead", "expected", "loadable", "load_ms"}


def test_round_robin_takes_turns():
    ledger, policy, seen = Ledger(), POLICIES["round_robin"](0), []
    for _ in range(4):
        fleet = [d(n, dispatched=ledger.of(n).dispatched) for n in ("d1", "d2")]
        seen.append(policy.choose(SchedulingRequest(10), fleet).decode)
        with ledger.charge(seen[-1]):
            pass
    assert seen == ["d1", "d2", "d1", "d2"]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    ("fleet", "request_"),
    [
        pytest.param([], SchedulingRequest(1), id="empty"),
        pytest.param([p("p1")], SchedulingRequest(1), id="prefill only"),
        pytest.param([d("d1")], SchedulingRequest(1, excluded=frozenset({"d1"})), id="excluded"),
    ],
)
def test_no_worker(name, fleet, request_):
    with pytest.raises(Unavailable) as refused:
        POLICIES[name](0).choose(request_, fleet)
    assert refused.value.retry_after_s is not None


def test_a_waiting_handle_prefers_who_can_pull_it():
    fleet = [Candidate("d1", False, True, "other"), d("d2", running=9)]
    request = SchedulingRequest(10, may_prefill=False, kv_connector="c")
    assert POLICIES["least_uncached_tokens"](0).choose(request, fleet).decode == "d2"


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 99)), max_size=20))
def test_the_ledger_returns_to_zero(charges):
    ledger = Ledger()
    with pytest.raises(RuntimeError):
        nest(ledger, charges)
    assert ledger.total_requests == 0
    assert all(ledger.of(w).uncached_tokens == 0 for w in "ab")


def nest(ledger: Ledger, charges: list[tuple[str, int]]) -> None:
    if not charges:
        raise RuntimeError
    with ledger.charge(*charges[0]):
        assert ledger.of(charges[0][0]).requests >= 1
        nest(ledger, charges[1:])


HANDLE = KvHandle(b"", "e", "l", 9, 1, 4, 30.0)


@pytest.mark.parametrize(
    ("length", "sampling", "handle", "source"),
    [
        (9, Sampling(8), HANDLE, FirstToken.PREFILL),
        (9, Sampling(8), None, FirstToken.DECODE_ALONE),
        (8, Sampling(8), HANDLE, FirstToken.FULL_BLOCK),
        (9, Sampling(8, seed=1), HANDLE, FirstToken.SEEDED),
        (9, Sampling(8, seed=1, temperature=0), HANDLE, FirstToken.PREFILL),
        (9, Sampling(8, presence_penalty=1), HANDLE, FirstToken.PENALISED),
        (9, Sampling(8, frequency_penalty=-1), HANDLE, FirstToken.PENALISED),
        (9, Sampling(8, repetition_penalty=1.2), HANDLE, FirstToken.PREFILL),
    ],
)
def test_where_the_first_token_comes_from(length, sampling, handle, source):
    assert first_token_source(length, sampling, handle) is source


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
    with pytest.raises(InvalidRequest, match="known: least_uncached_tokens, round_robin"):
        Settings.load(environ | {"OMNI_PROXY_POLICY": "best"})
