"""What each shipped policy chooses, and what all of them hold to on any fleet."""

import asyncio
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_common.errors import Unavailable
from omni_proxy.scheduling.conformance import check_decision
from omni_proxy.scheduling.decision import Reason, eligible
from omni_proxy.scheduling.policies import POLICIES, policy_of
from omni_proxy.scheduling.policies.legs import ByLeg, Ranking
from omni_proxy.scheduling.request import SchedulingRequest, Slo
from omni_proxy.scheduling.view import FleetView, WorkerRow, view_of

RANK_EACH_LEG = [name for name in POLICIES if name != "cost"]


def p(name: str, **state) -> WorkerRow:
    return WorkerRow(name, prefills=True, **state)


def d(name: str, **state) -> WorkerRow:
    return WorkerRow(name, decodes=True, **state)


def both(name: str, **state) -> WorkerRow:
    return WorkerRow(name, prefills=True, decodes=True, **state)


def choice(policy, fleet, prompt_tokens=100, **request):
    decision = policy.choose(SchedulingRequest(prompt_tokens, **request), view_of(fleet))
    return decision.prefill, decision.decode


# What holds for all


def rows() -> st.SearchStrategy[WorkerRow]:
    few, many = st.integers(0, 5), st.integers(0, 200_000)
    ms = st.floats(0, 60_000)
    labels = st.dictionaries(
        st.sampled_from(["omni.host", "omni.rack", "omni.zone", "omni.prompt_tokens"]),
        st.sampled_from(["", "a", "b", "a,b", "0-500", "500-", "7"]),
    )
    return st.builds(
        WorkerRow,
        st.text("ab0", min_size=1, max_size=6),
        prefills=st.booleans(),
        decodes=st.booleans(),
        connector=st.sampled_from(["", "c", "d"]),
        group=st.sampled_from(["", "g", "h"]),
        labels=labels,
        cached_tokens=many,
        expected_tokens=many,
        loadable_tokens=many,
        load_ms=ms,
        has_adapter=st.booleans(),
        adapter_ms=ms,
        own_requests=few,
        own_prefills=few,
        own_uncached_tokens=many,
        own_output_tokens=many,
        dispatched=few,
        others_prefills=few,
        others_uncached_tokens=many,
        others_sequences=few,
        running=few,
        waiting=few,
        kv_usage=st.floats(0, 1),
        context_tokens=many,
        max_num_seqs=few,
        queue_ms=ms,
        prefill_ms=ms,
        step_ms=ms,
        stall_ms=ms,
        seat_ms=ms,
        confidence=st.floats(0, 1),
    )


fleets = st.lists(rows(), max_size=10, unique_by=lambda row: row.worker_id)


@st.composite
def questions(draw) -> tuple[SchedulingRequest, FleetView]:
    view = view_of(draw(fleets))
    workers = st.sampled_from(view.ids or ("gone",))
    request = SchedulingRequest(
        prompt_tokens=draw(st.integers(0, 100_000)),
        may_prefill=draw(st.booleans()),
        kv_connector=draw(st.sampled_from([None, "c", "d"])),
        held_by=draw(st.none() | workers),
        excluded=draw(st.frozensets(workers, max_size=3)),
        slo=draw(st.sampled_from([Slo(), Slo(500.0, 20.0)])),
        session=draw(st.sampled_from(["", "s", "t"])),
        adapter=draw(st.sampled_from(["", "a", "z"])),
    )
    return request, view


def parameters_of(name: str, least: int | None) -> dict:
    extra = {"length_bucket": {"bounds": (500, 5000)}, "session": {"balance": 1.0}}
    return {"disaggregate_min_tokens": least, **extra.get(name, {})}


@pytest.mark.parametrize("name", POLICIES)
@given(asked=st.lists(questions(), min_size=1, max_size=4), least=st.sampled_from([None, 0, 64]))
@settings(max_examples=15, deadline=None)
def test_only_workers_that_may_be_chosen_are(name, asked, least):
    policy = policy_of(name, parameters_of(name, least))
    for request, view in asked:
        try:
            eligible(request, view)
        except Unavailable:
            with pytest.raises(Unavailable) as refused:
                policy.choose(request, view)
            assert refused.value.retry_after_s is not None
        else:
            decision = policy.choose(request, view)
            check_decision(request, view, decision)
            assert decision.policy == name


@pytest.mark.parametrize("name", RANK_EACH_LEG)
@given(asked=st.lists(questions(), min_size=1, max_size=4), least=st.sampled_from([None, 0, 64]))
@settings(max_examples=15, deadline=None)
def test_every_candidate_has_its_cost_and_the_least_is_chosen(name, asked, least):
    policy = policy_of(name, parameters_of(name, least))
    for request, view in asked:
        try:
            prefills, decodes = eligible(request, view)
        except Unavailable:
            continue
        decision = policy.choose(request, view)
        assert decision.prefill_costs.rows.tolist() == prefills.tolist()
        assert decision.decode_costs.rows.tolist() == decodes.tolist()
        decode = view.ids.index(decision.decode)
        if decision.prefill is None:
            costs = decision.alone_costs if len(decision.alone_costs.rows) else decision.decode_costs
            pulling = np.ones(len(decodes), np.bool_)
            if request.kv_connector and request.held_by in view.ids:
                pulling = view.can_pair(np.array([view.ids.index(request.held_by)]), decodes)[0]
            assert costs.value[costs.rows == decode] == costs.value[pulling if pulling.any() else slice(None)].min()
            continue
        prefill = view.ids.index(decision.prefill)
        pairs = view.can_pair(prefills, decodes)
        assert (
            decision.prefill_costs.value[prefills == prefill] == decision.prefill_costs.value[pairs.any(axis=1)].min()
        )
        mine = pairs[prefills == prefill][0]
        assert decision.decode_costs.value[decodes == decode] == decision.decode_costs.value[mine].min()


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
        policy_of(name).choose(request_, view_of(fleet))
    assert refused.value.retry_after_s is not None


@pytest.mark.parametrize("name", RANK_EACH_LEG)
@pytest.mark.parametrize(
    ("fleet", "least", "chosen", "reason"),
    [
        pytest.param([p("p1"), d("d1")], 0, ("p1", "d1"), Reason.DISAGGREGATED, id="pair"),
        pytest.param([p("p1"), d("d1")], None, (None, "d1"), Reason.SHORT, id="never apart"),
        pytest.param([p("p1"), d("d1", cached_tokens=95)], 10, (None, "d1"), Reason.SHORT, id="short"),
        pytest.param([d("d1")], 0, (None, "d1"), Reason.NO_PREFILL, id="decode alone"),
        pytest.param([p("p1"), d("d1", connector="x")], 0, (None, "d1"), Reason.NO_CONNECTOR, id="connector"),
        pytest.param([both("b1")], 0, (None, "b1"), Reason.NO_CONNECTOR, id="never a pair with itself"),
        pytest.param(
            [p("p1", group="g"), p("p2", group="h"), d("d1", group="h")],
            0,
            ("p2", "d1"),
            Reason.DISAGGREGATED,
            id="group",
        ),
        pytest.param(
            [p("p1"), d("d1", connector="x"), d("d2", others_sequences=9)],
            0,
            ("p1", "d2"),
            Reason.DISAGGREGATED,
            id="pairable decode",
        ),
    ],
)
def test_the_shape_of_a_decision(name, fleet, least, chosen, reason):
    policy = policy_of(name, {"disaggregate_min_tokens": least})
    decision = policy.choose(SchedulingRequest(100), view_of(fleet))
    assert ((decision.prefill, decision.decode), decision.reason) == (chosen, reason)


@pytest.mark.parametrize("name", POLICIES)
def test_a_waiting_handle_prefers_who_can_pull_it(name):
    fleet = view_of([d("d1", connector="other"), d("d2", others_sequences=9)])
    request = SchedulingRequest(10, may_prefill=False, kv_connector="c")
    decision = policy_of(name).choose(request, fleet)
    assert (decision.decode, decision.reason) == ("d2", Reason.CONTINUED)


@pytest.mark.parametrize("name", RANK_EACH_LEG)
def test_a_waiting_handle_is_pulled_inside_its_group(name):
    fleet = view_of([p("p1", group="g"), d("d1", group="h"), d("d2", group="g", others_sequences=9)])
    request = SchedulingRequest(10, may_prefill=False, kv_connector="c", held_by="p1")
    assert policy_of(name).choose(request, fleet).decode == "d2"


def test_a_decision_carries_what_the_predictors_say():
    fleet = view_of([p("p1", queue_ms=3, prefill_ms=5), d("d1", step_ms=7)], pair_ms=2)
    prediction = policy_of("round_robin").choose(SchedulingRequest(9), fleet).prediction
    assert (prediction.ttft_ms, prediction.transfer_ms, prediction.step_ms) == (8, 2, 7)


def test_decode_is_ranked_with_the_worker_its_blocks_come_from():
    seen = []

    def rule(request, view, rows):
        seen.append(request.held_by)
        return Ranking(np.zeros(len(rows)))

    ByLeg("test", rule, rule).choose(SchedulingRequest(9), view_of([p("p1"), d("d1")]))
    assert seen == [None, None, "p1"]


# Load


@pytest.mark.parametrize(
    ("fleet", "chosen"),
    [
        pytest.param([p("p1", own_uncached_tokens=50), p("p2"), d("d1")], ("p2", "d1"), id="ledger"),
        pytest.param([p("p1", others_uncached_tokens=50), p("p2"), d("d1")], ("p2", "d1"), id="other proxies"),
        pytest.param([p("p1"), p("p2", cached_tokens=64), d("d1")], ("p2", "d1"), id="prefix"),
        pytest.param(
            [p("p1"), p("p2", cached_tokens=64, others_uncached_tokens=90), d("d1")], ("p1", "d1"), id="queue"
        ),
        pytest.param(
            [p("p1", cached_tokens=96, expected_tokens=96, own_uncached_tokens=100), p("p2"), d("d1")],
            ("p1", "d1"),
            id="the prefix is on its way",
        ),
        pytest.param(
            [p("p1", cached_tokens=96, expected_tokens=96, own_uncached_tokens=200), p("p2"), d("d1")],
            ("p2", "d1"),
            id="the prefix is on its way behind other work",
        ),
        pytest.param([p("p1"), p("p2", loadable_tokens=64, own_requests=3), d("d1")], ("p2", "d1"), id="loadable"),
        pytest.param(
            [p("p1", loadable_tokens=64, load_ms=9), p("p2", loadable_tokens=64, load_ms=8), d("d1")],
            ("p2", "d1"),
            id="loaded sooner",
        ),
        pytest.param([p("p1", own_requests=1), p("p2"), d("d1")], ("p2", "d1"), id="requests"),
        pytest.param([p("p1", dispatched=2), p("p2", dispatched=1), d("d1")], ("p2", "d1"), id="turns"),
        pytest.param([p("p1"), d("d1", others_sequences=3), d("d2", others_sequences=1)], ("p1", "d2"), id="running"),
        pytest.param([p("p1"), d("d1", own_requests=1), d("d2")], ("p1", "d2"), id="own running"),
        pytest.param([d("d1", own_uncached_tokens=50), d("d2", own_requests=3)], (None, "d2"), id="alone"),
    ],
)
def test_least_uncached_tokens(fleet, chosen):
    policy = policy_of("least_uncached_tokens", {"disaggregate_min_tokens": 10})
    decision = policy.choose(SchedulingRequest(100), view_of(fleet))
    assert (decision.prefill, decision.decode) == chosen
    assert decision.prefill_costs.terms.keys() <= {"own", "ahead", "expected", "loadable", "load_ms"}


@pytest.mark.parametrize(
    ("fleet", "chosen"),
    [
        pytest.param([p("p1", own_uncached_tokens=9), p("p2"), d("d1")], ("p2", "d1"), id="tokens ahead"),
        pytest.param([p("p1"), p("p2", cached_tokens=99, own_requests=1), d("d1")], ("p1", "d1"), id="no prefix"),
        pytest.param([p("p1"), d("d1", own_requests=2), d("d2", others_sequences=1)], ("p1", "d2"), id="sequences"),
    ],
)
def test_least_loaded(fleet, chosen):
    assert choice(policy_of("least_loaded"), fleet) == chosen


def sent(policy, fleet) -> tuple[str | None, str]:
    """Choose, and count what is sent as the ledger does."""
    chosen = choice(policy, fleet)
    for row in fleet:
        row.dispatched += row.worker_id in chosen
    return chosen


def test_round_robin_takes_turns():
    policy, fleet = policy_of("round_robin"), [p("p1"), p("p2"), d("d1"), d("d2"), d("d3")]
    seen = [sent(policy, fleet) for _ in range(6)]
    assert seen == [("p1", "d1"), ("p2", "d2"), ("p1", "d3"), ("p2", "d1"), ("p1", "d2"), ("p2", "d3")]
    assert choice(policy, fleet) == choice(policy, fleet) == ("p1", "d1")


def test_who_joins_or_returns_gets_a_turn_and_no_more():
    policy, fleet = policy_of("round_robin"), [d("d1"), d("d2"), p("p1")]
    for _ in range(20):
        sent(policy, fleet)
    late = d("d0", dispatched=3)
    assert [sent(policy, [*fleet, late])[1] for _ in range(6)] == ["d0", "d1", "d2"] * 2
    for _ in range(10):
        sent(policy, fleet)
    assert [sent(policy, [late, *fleet])[1] for _ in range(6)] == ["d0", "d1", "d2"] * 2


@pytest.mark.parametrize("name", sorted({*POLICIES} - {"session"}))
def test_a_burst_does_not_all_go_to_who_has_just_joined(name):
    """All are idle by their own word, which is older than the burst, and the newcomer has been sent the least ever."""
    fleet = [p("p1", dispatched=500), p("p2", dispatched=500), d("d1", dispatched=500), d("d2", dispatched=500)]
    fleet += [p("new-p"), d("new-d")]
    policy, chosen = policy_of(name), Counter[str | None]()
    for _ in range(30):
        pair = sent(policy, fleet)
        chosen.update(pair)
        for row in fleet:
            row.own_requests += row.worker_id in pair
            row.own_prefills += row.worker_id == pair[0]
            row.own_uncached_tokens += 100 * (row.worker_id == pair[0])
            row.queue_ms += 10.0 * (row.worker_id == pair[0])
    assert chosen["new-p"] <= 15 and chosen["new-d"] <= 15, chosen


def test_power_of_two_takes_the_lesser_of_two():
    fleet = [d(f"d{load}", others_sequences=load, own_uncached_tokens=load) for load in range(10)]
    policy = policy_of("power_of_two", {"seed": 3})
    drawn = Counter(choice(policy, fleet)[1] for _ in range(900))
    assert "d9" not in drawn
    # Of n workers the k-th least loaded is the lesser of two with 2 (n - k) / n (n - 1); here 180, 160, ... of 900.
    assert all(abs(drawn[f"d{k - 1}"] - 900 * 2 * (10 - k) / 90) < 60 for k in range(1, 10))
    same = policy_of("power_of_two", {"seed": 3})
    assert Counter(choice(same, fleet)[1] for _ in range(900)) == drawn


# Prefix


@pytest.mark.parametrize(
    ("fleet", "chosen"),
    [
        pytest.param([p("p1", cached_tokens=90), p("p2", cached_tokens=85), d("d1")], "p1", id="the longest"),
        pytest.param([p("p1"), p("p2", cached_tokens=80, own_uncached_tokens=10**6), d("d1")], "p2", id="above load"),
        pytest.param([p("p1"), p("p2", cached_tokens=79, own_requests=1), d("d1")], "p1", id="below the threshold"),
        pytest.param([p("p1", own_uncached_tokens=5), p("p2"), d("d1")], "p2", id="no hit: load"),
        pytest.param(
            [p("p1", cached_tokens=90, own_uncached_tokens=9), p("p2", cached_tokens=90), d("d1")], "p2", id="tie"
        ),
    ],
)
def test_prefix_affinity(fleet, chosen):
    assert choice(policy_of("prefix_affinity"), fleet)[0] == chosen


def test_prefix_affinity_follows_the_prefix_to_decode():
    fleet = [p("p1"), d("d1"), d("d2", cached_tokens=95, others_sequences=9)]
    assert choice(policy_of("prefix_affinity", {"disaggregate_min_tokens": 16}), fleet) == (None, "d2")


AT_100_PER_S = {"prefill_tokens_per_s": 100, "max_penalty_ms": 9990}


@pytest.mark.parametrize(
    ("warm", "cold", "parameters", "chosen"),
    [
        pytest.param({"own_uncached_tokens": 500, "queue_ms": 17_000}, {}, {}, "warm", id="sticky"),
        pytest.param({"own_uncached_tokens": 500, "queue_ms": 18_001}, {}, {}, "cold", id="saturated"),
        pytest.param({"queue_ms": 30_000}, {"queue_ms": 15_000}, {}, "warm", id="saturated everywhere"),
        pytest.param({"queue_ms": 1e9}, {}, {"max_penalty_ms": 0}, "warm", id="for ever"),
        pytest.param({"own_uncached_tokens": 999}, {}, AT_100_PER_S, "warm", id="rate"),
        pytest.param({"own_uncached_tokens": 1000}, {}, AT_100_PER_S, "cold", id="rate over"),
        pytest.param({"cached_tokens": 10, "own_uncached_tokens": 500}, {}, {}, "cold", id="not warm enough"),
    ],
)
def test_sticky_until_saturated(warm, cold, parameters, chosen):
    fleet = [p("warm", **{"cached_tokens": 80, **warm}), p("cold", **cold), d("d1")]
    assert choice(policy_of("sticky_until_saturated", parameters), fleet)[0] == chosen


def test_sticky_shares_among_those_that_hold_the_prefix():
    fleet = [p("a", cached_tokens=90, own_uncached_tokens=50), p("b", cached_tokens=80), p("c"), d("d1")]
    assert choice(policy_of("sticky_until_saturated"), fleet)[0] == "b"


# Scores


@pytest.mark.parametrize(
    ("parameters", "chosen"),
    [
        pytest.param({}, "idle", id="queue and cache outweigh a half hit"),
        pytest.param({"scorers": [{"name": "prefix"}]}, "warm", id="prefix alone"),
        pytest.param({"scorers": [{"name": "queue"}, {"name": "prefix", "weight": 3}]}, "warm", id="weights"),
        pytest.param(
            {"scorers": [{"name": "token_load", "parameters": {"most_tokens": 200}}]}, "warm", id="parameters"
        ),
    ],
)
def test_weighted_scorers(parameters, chosen):
    fleet = [p("warm", cached_tokens=50, waiting=4, kv_usage=0.9), p("idle"), d("d1", waiting=400)]
    assert choice(policy_of("weighted_scorers", parameters), fleet)[0] == chosen


def test_scores_of_decode_may_be_others():
    fleet = [p("p1"), d("warm", cached_tokens=50, others_sequences=1), d("idle", others_sequences=1, kv_usage=0.5)]
    parameters = {"decode_scorers": [{"name": "kv_usage"}, {"name": "prefix", "weight": 0.1}]}
    assert choice(policy_of("weighted_scorers", parameters), fleet)[1] == "warm"
    parameters = {"decode_scorers": [{"name": "active_requests"}, {"name": "queue"}]}
    assert choice(policy_of("weighted_scorers", parameters), [p("p1"), d("a", waiting=1), d("b")])[1] == "b"


def test_cold_prompts_go_round_when_a_scorer_remembers():
    policy = policy_of("weighted_scorers", {"scorers": [{"name": "no_hit_lru"}]})
    fleet = [d(name) for name in "abc"]
    assert [choice(policy, fleet)[1] for _ in range(5)] == ["a", "b", "c", "a", "b"]


# Sessions


def test_a_session_stays_and_sessions_spread():
    fleet = [d(f"d{i}") for i in range(10)]
    policy = policy_of("session")
    homes = {f"s{i}": choice(policy, fleet, session=f"s{i}")[1] for i in range(1000)}
    assert homes == {session: choice(policy_of("session"), fleet[::-1], session=session)[1] for session in homes}
    assert all(60 < count < 140 for count in Counter(homes.values()).values())


def test_only_the_sessions_of_a_lost_worker_move():
    fleet = [d(f"d{i}") for i in range(10)]
    policy = policy_of("session")
    for number in range(300):
        before = choice(policy, fleet, session=f"s{number}")[1]
        after = choice(policy, fleet[1:], session=f"s{number}")[1]
        assert before == after or before == "d0"


def test_a_session_moves_on_from_a_worker_that_holds_more_than_its_share():
    fleet, policy = [p("p1"), *(d(f"d{i}", others_sequences=8) for i in range(4))], policy_of("session")
    home = choice(policy, fleet, session="s")[1]
    busy = next(row for row in fleet if row.worker_id == home)
    # 35 sequences on four workers: 1.25 times the mean is 10.9, 1.3 times 11.4.
    busy.others_sequences = 11
    assert choice(policy, fleet, session="s")[1] != home
    assert choice(policy_of("session", {"balance": 1.3}), fleet, session="s")[1] == home
    assert choice(policy_of("session", {"free_sequences": 11}), fleet, session="s")[1] == home


def test_a_session_moves_on_from_a_prefill_worker_by_tokens():
    fleet, policy = [p("p1"), p("p2"), d("d1")], policy_of("session")
    home = choice(policy, fleet, session="s")[0]
    busy = next(row for row in fleet if row.worker_id == home)
    busy.own_uncached_tokens, busy.own_requests = 16_384, 99
    assert choice(policy, fleet, session="s")[0] == home
    busy.own_uncached_tokens += 1
    assert choice(policy, fleet, session="s")[0] != home


def test_without_a_session_the_prefix_stands_in():
    fleet = [d("d1", own_uncached_tokens=9), d("d2", cached_tokens=80, own_uncached_tokens=16_384)]
    assert choice(policy_of("session"), fleet)[1] == "d2"
    fleet[1].own_uncached_tokens += 1
    assert choice(policy_of("session"), fleet)[1] == "d1"


# Labels


@pytest.mark.parametrize(
    ("near", "chosen"),
    [
        pytest.param({"omni.host": "h", "omni.zone": "z"}, "near", id="host"),
        pytest.param({"omni.zone": "z"}, "near", id="zone"),
        pytest.param({"omni.zone": "y"}, "far", id="elsewhere"),
        pytest.param({}, "far", id="unknown"),
    ],
)
def test_topology_prefers_decode_near_its_prefill(near, chosen):
    far = {"omni.host": "i", "omni.zone": "x"}
    here = {"omni.host": "h", "omni.zone": "z"}
    fleet = [p("p1", labels=here), d("far", labels=far, kv_usage=0.0), d("near", labels=near, kv_usage=0.5)]
    assert choice(policy_of("topology"), fleet)[1] == chosen


def test_topology_gives_way_to_load():
    here, far = {"omni.host": "h"}, {"omni.host": "i"}
    fleet = [p("p1", labels=here), d("far", labels=far), d("near", labels=here, others_sequences=8)]
    assert choice(policy_of("topology"), fleet)[1] == "near"
    assert choice(policy_of("topology", {"far_sequences": 7}), fleet)[1] == "far"


def test_blocks_that_wait_are_pulled_from_near():
    fleet = [p("p1", labels={"omni.zone": "z"}), d("d1", labels={"omni.zone": "y"}), d("d2", labels={"omni.zone": "z"})]
    request = {"may_prefill": False, "kv_connector": "c", "held_by": "p1"}
    assert choice(policy_of("topology"), fleet, **request)[1] == "d2"


@pytest.mark.parametrize(
    ("adapter", "loaded", "chosen"),
    [
        pytest.param("a", {"own_uncached_tokens": 4000, "own_requests": 3}, ("p2", "d2"), id="loaded"),
        pytest.param("a", {"own_uncached_tokens": 4100, "own_requests": 5}, ("p1", "d1"), id="too busy"),
        pytest.param("", {"own_uncached_tokens": 1, "own_requests": 1}, ("p1", "d1"), id="the model itself"),
    ],
)
def test_lora_affinity(adapter, loaded, chosen):
    has = {"has_adapter": not adapter}
    fleet = [p("p1", **has), p("p2", **loaded), d("d1", **has), d("d2", **loaded)]
    assert choice(policy_of("lora_affinity"), fleet, adapter=adapter) == chosen


def test_length_buckets_by_label():
    short, long = {"omni.prompt_tokens": "0-1000"}, {"omni.prompt_tokens": "1000-"}
    fleet = [p("ps", labels=short, own_requests=9), p("pl", labels=long), d("ds", labels=short), d("dl", labels=long)]
    assert choice(policy_of("length_bucket"), fleet, 999) == ("ps", "ds")
    assert choice(policy_of("length_bucket"), fleet, 1000) == ("pl", "dl")
    fleet[1].own_uncached_tokens = 70_000
    assert choice(policy_of("length_bucket"), fleet, 1000) == ("ps", "dl")


def test_length_buckets_shared_out():
    fleet = [p("p1"), p("p2"), p("p3"), d("d1"), d("d2"), d("d3")]
    policy = policy_of("length_bucket", {"bounds": [100, 1000]})
    assert [choice(policy, fleet, tokens) for tokens in (99, 100, 5000)] == [("p1", "d1"), ("p2", "d2"), ("p3", "d3")]


# Batches


@pytest.mark.parametrize(
    ("fleet", "chosen"),
    [
        pytest.param([d("d1", context_tokens=90), d("d2", context_tokens=80, others_sequences=5)], "d2", id="held"),
        pytest.param([d("d1", own_output_tokens=90), d("d2", context_tokens=80)], "d2", id="to be generated"),
        pytest.param([d("d1", others_sequences=32), d("d2", context_tokens=10**6)], "d2", id="full"),
        pytest.param([d("d1", others_sequences=8, max_num_seqs=8), d("d2", context_tokens=9)], "d2", id="its own word"),
    ],
)
def test_lpt(fleet, chosen):
    assert choice(policy_of("lpt"), [p("p1"), *fleet])[1] == chosen


@pytest.mark.parametrize(
    ("fleet", "chosen"),
    [
        # Learned: 40 + 10 + 10 * 1 against 10 + 10 + 10 * 4.
        pytest.param(
            [
                p("p1", own_prefills=1, queue_ms=40, prefill_ms=10),
                p("p2", others_prefills=2, queue_ms=10, prefill_ms=10),
            ],
            "p1",
            id="learned",
        ),
        # Table: T(4) + 9 (T(4) - T(3)) = 380 + 450 against T(3) + 4 (T(3) - T(2)) = 330 + 200.
        pytest.param(
            [p("p1", own_prefills=3, confidence=0), p("p2", own_prefills=2, queue_ms=999, confidence=0)],
            "p2",
            id="table",
        ),
        pytest.param([p("p1", own_prefills=32), p("p2", own_prefills=1, queue_ms=1e6)], "p2", id="too many prompts"),
        pytest.param(
            [p("p1", own_prefills=1, own_uncached_tokens=32_000), p("p2", own_prefills=1, queue_ms=1e6)],
            "p2",
            id="full",
        ),
    ],
)
def test_earliest_batch(fleet, chosen):
    assert choice(policy_of("earliest_batch"), [*fleet, d("d1")])[0] == chosen


def test_earliest_batch_by_the_table_counts_prompts_alone():
    fleet = [p("p1", own_prefills=1, cached_tokens=99), p("p2", queue_ms=9, prefill_ms=9), d("d1")]
    assert choice(policy_of("earliest_batch"), fleet)[0] == "p1"
    assert choice(policy_of("earliest_batch", {"learned": False}), fleet)[0] == "p2"


def test_earliest_batch_takes_the_first_free_seat():
    fleet = [p("p1"), d("d1", seat_ms=40), d("d2", seat_ms=30, context_tokens=10**6)]
    assert choice(policy_of("earliest_batch"), fleet)[1] == "d2"


@pytest.mark.parametrize("name", RANK_EACH_LEG)
def test_what_is_said_of_a_choice_is_for_people(name):
    view = view_of([p("p1"), p("p2", queue_ms=4), d("d1"), d("d2")])
    told = policy_of(name).choose(replace(SchedulingRequest(100), session="s", adapter="a"), view).explained(1)
    assert [len(candidates) for candidates in told["candidates"].values()] == [1, 1]
    assert told["candidates"]["prefill"][0]["worker"] == told["prefill"]


# Over the real wires


@pytest.mark.parametrize("name", POLICIES)
async def test_every_policy_serves(start, name):
    stack = await start("p1 p2 d1 d2", settings={"policy": name})
    answers = await asyncio.gather(*(stack.chat(user=f"u{number}") for number in range(6)))
    assert [answer.status_code for answer in answers] == [200] * 6
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1
    assert stack.metric("omni_proxy_decisions_total", reason="disaggregated", policy=name) >= 6
    await stack.until_settled()
