"""Filters, scorers, plug-ins by name, and those of other distributions."""

import re
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest

from omni_common.errors import FailedPrecondition, InvalidRequest, Unavailable
from omni_proxy.flow.orders import ORDERS, known_orders
from omni_proxy.flow.ticket import Ticket
from omni_proxy.scheduling import plugins
from omni_proxy.scheduling.filtered import Filtered
from omni_proxy.scheduling.filters import FILTERS, filters
from omni_proxy.scheduling.policies import POLICIES, policies, policy_of
from omni_proxy.scheduling.predictors import PREDICTORS, predictors
from omni_proxy.scheduling.request import SchedulingRequest, Slo
from omni_proxy.scheduling.scorers import SCORERS, scorers
from omni_proxy.scheduling.view import WorkerRow, view_of

TABLES = {"filters": FILTERS, "scorers": SCORERS, "policies": POLICIES, "predictors": PREDICTORS}


def p(name: str, **state) -> WorkerRow:
    return WorkerRow(name, prefills=True, **state)


def d(name: str, **state) -> WorkerRow:
    return WorkerRow(name, decodes=True, **state)


def kept(name, parameters, fleet, prompt_tokens=100, **request) -> str:
    keep = FILTERS[name].build(name, parameters).keep(SchedulingRequest(prompt_tokens, **request), view_of(fleet))
    return "".join(row.worker_id for row, stays in zip(fleet, keep, strict=True) if stays)


def scores(name, fleet, parameters=None, prompt_tokens=100, **request) -> list[float]:
    scorer = SCORERS[name].build(name, parameters)
    return [round(s, 4) for s in scorer.score(SchedulingRequest(prompt_tokens, **request), view_of(fleet)).tolist()]


# Filters

ZONES = [p("a", labels={"zone": "x", "cores": "8"}), p("b", labels={"zone": "y", "cores": "16"}), d("c")]


@pytest.mark.parametrize(
    ("parameters", "who"),
    [
        pytest.param({}, "abc", id="nothing asked"),
        pytest.param({"match_labels": {"zone": "x"}}, "a", id="label"),
        pytest.param({"match_labels": {"zone": "x", "cores": "16"}}, "", id="all of them"),
        pytest.param({"match_expressions": [{"key": "zone", "operator": "In", "values": ["x", "y"]}]}, "ab", id="in"),
        pytest.param({"match_expressions": [{"key": "zone", "operator": "NotIn", "values": ["x"]}]}, "bc", id="not in"),
        pytest.param({"match_expressions": [{"key": "zone", "operator": "Exists"}]}, "ab", id="exists"),
        pytest.param({"match_expressions": [{"key": "zone", "operator": "DoesNotExist"}]}, "c", id="does not exist"),
        pytest.param({"match_expressions": [{"key": "cores", "operator": "Gt", "values": ["8"]}]}, "b", id="greater"),
        pytest.param({"match_expressions": [{"key": "cores", "operator": "Lt", "values": ["9"]}]}, "a", id="less"),
        pytest.param({"match_expressions": [{"key": "zone", "operator": "Lt", "values": ["9"]}]}, "", id="no number"),
    ],
)
def test_selector(parameters, who):
    assert kept("selector", parameters, ZONES) == who


def test_a_selector_looks_again_when_labels_change():
    selector = FILTERS["selector"].build("selector", {"match_labels": {"zone": "x"}})
    assert selector.keep(SchedulingRequest(1), view_of(ZONES)).tolist() == [True, False, False]
    moved = [p("a"), p("b", labels={"zone": "x"}), d("c")]
    assert selector.keep(SchedulingRequest(1), view_of(moved)).tolist() == [False, True, False]


@pytest.mark.parametrize(("role", "who"), [("prefill", "a"), ("decode", "b"), ("both", "c")])
def test_role(role, who):
    fleet = [p("a"), d("b"), WorkerRow("c", prefills=True, decodes=True)]
    assert kept("role", {"role": role}, fleet) == who


@pytest.mark.parametrize(
    ("parameters", "who"),
    [
        pytest.param({}, "abcdefg", id="no caps"),
        pytest.param({"max_active": 3}, "abcdef", id="active"),
        pytest.param({"max_running": 3}, "acdefg", id="running"),
        pytest.param({"max_waiting": 3}, "abdefg", id="waiting"),
        pytest.param({"max_kv_usage": 0.5}, "abcefg", id="kv usage"),
        pytest.param({"max_uncached_tokens": 3}, "abcdfg", id="tokens"),
        pytest.param({"max_stats_age_s": 3}, "abcdeg", id="age"),
        pytest.param({"max_running": 3, "max_waiting": 3}, "adefg", id="all of them"),
    ],
)
def test_utilization(parameters, who):
    fleet = [
        p("a", running=3, waiting=3, kv_usage=0.5, own_requests=3, own_uncached_tokens=3, stats_age_s=3),
        p("b", running=4),
        p("c", waiting=4),
        p("d", kv_usage=0.6),
        p("e", own_uncached_tokens=2, others_uncached_tokens=2),
        p("f", stats_age_s=4),
        p("g", own_requests=4),
    ]
    assert kept("utilization", parameters, fleet) == who


@pytest.mark.parametrize(
    ("fleet", "who"),
    [
        pytest.param([p("a", cached_tokens=80), p("b", cached_tokens=79)], "a", id="the near"),
        pytest.param([p("a"), p("b", cached_tokens=79)], "ab", id="none is near"),
        pytest.param([p("a", cached_tokens=80, queue_ms=18_000), p("b")], "a", id="waits"),
        pytest.param([p("a", cached_tokens=80, queue_ms=18_001), p("b")], "ab", id="waits too long"),
    ],
)
def test_prefix_affinity_filter(fleet, who):
    assert kept("prefix_affinity", {}, fleet) == who


@pytest.mark.parametrize(
    ("slo", "margin", "who"),
    [
        pytest.param(Slo(), 0, "abcd", id="nothing promised"),
        pytest.param(Slo(ttft_ms=100), 0, "acd", id="ttft"),
        pytest.param(Slo(itl_ms=20), 0, "abc", id="itl"),
        pytest.param(Slo(ttft_ms=100, itl_ms=20), 0.5, "", id="margin"),
    ],
)
def test_slo_headroom(slo, margin, who):
    fleet = [
        p("a", queue_ms=40, prefill_ms=30),
        p("b", queue_ms=50, load_ms=1, prefill_ms=30),
        d("c", queue_ms=1000, step_ms=20),
        d("d", step_ms=21),
    ]
    assert kept("slo_headroom", {"margin": margin}, fleet, slo=slo, waited_ms=20) == who


@pytest.mark.parametrize(
    ("state", "stays"),
    [
        pytest.param({}, True, id="nothing known"),
        pytest.param({"kv_usage": 0.5, "context_tokens": 1000}, True, id="half of 2000"),
        pytest.param({"kv_usage": 0.79, "context_tokens": 1580}, True, id="just fits"),
        pytest.param({"kv_usage": 0.81, "context_tokens": 1620}, False, id="not any more"),
        pytest.param({"kv_usage": 0.81, "context_tokens": 1620, "cached_tokens": 50}, True, id="cached"),
        pytest.param({"kv_usage": 0.01, "context_tokens": 10}, True, id="all but empty"),
    ],
)
def test_kv_room(state, stays):
    # 100 + 300 of 2000 tokens are a fifth.
    assert (kept("kv_room", {"max_usage": 1.0}, [p("a", **state)], output_tokens=300) == "a") is stays


def test_lora_filter():
    assert kept("lora", {}, [p("a"), p("b", has_adapter=False)], adapter="y") == "a"
    assert kept("lora", {}, [p("a"), p("b")]) == "ab"


def test_length_range_filter():
    fleet = [p("a", labels={"omni.prompt_tokens": "-100"}), p("b", labels={"omni.prompt_tokens": "100-200"}), p("c")]
    assert [kept("length_range", {}, fleet, n) for n in (99, 100, 200)] == ["ac", "bc", "c"]


def test_topology_filter():
    fleet = [p("a", labels={"omni.zone": "z"}), d("b", labels={"omni.zone": "z"}), d("c", labels={"omni.zone": "y"})]
    assert kept("topology", {}, fleet, held_by="a") == "ab"
    assert kept("topology", {"least": 0.2}, fleet, held_by="a") == "a"
    assert kept("topology", {}, fleet, held_by="gone") == kept("topology", {}, fleet) == "abc"


# Filters in front of a policy

CAP = {"filter": "utilization", "parameters": {"max_running": 3}}


@pytest.mark.parametrize(
    ("fleet", "use", "chosen"),
    [
        pytest.param([p("p1", running=9), p("p2", own_requests=1), d("d1")], {}, ("p2", "d1"), id="prefill"),
        pytest.param([p("p1"), d("d1", running=9), d("d2", own_requests=1)], {}, ("p1", "d2"), id="decode"),
        pytest.param([p("p1", running=9), d("d1")], {}, ("p1", "d1"), id="nobody left: not filtered"),
        pytest.param([p("p1", running=9), d("d1")], {"required": True}, (None, "d1"), id="nobody left: none"),
        pytest.param(
            [p("p1", running=9), p("p2", own_requests=1), d("d1")], {"legs": "decode"}, ("p1", "d1"), id="one leg"
        ),
    ],
)
def test_a_policy_sees_what_filters_leave(fleet, use, chosen):
    decision = policy_of("least_loaded", filters=[{**CAP, **use}]).choose(SchedulingRequest(9), view_of(fleet))
    assert (decision.prefill, decision.decode) == chosen


def test_a_required_filter_may_leave_nobody():
    policy = policy_of("least_loaded", filters=[{**CAP, "required": True}])
    with pytest.raises(Unavailable, match="the filter utilization left no decode worker") as refused:
        policy.choose(SchedulingRequest(9), view_of([p("p1"), d("d1", running=9)]))
    assert (refused.value.reason, refused.value.retry_after_s) == ("filtered_out", 1.0)


def test_an_excluded_worker_is_not_one_that_is_left():
    fleet = view_of([d("d1"), d("d2", running=9)])
    request = SchedulingRequest(9, excluded=frozenset({"d1"}))
    assert policy_of("least_loaded", filters=[CAP]).choose(request, fleet).decode == "d2"


def test_blocks_that_wait_outweigh_a_filter_that_is_not_required():
    fleet = view_of([d("a", running=9), d("b", connector="other")])
    request = SchedulingRequest(9, may_prefill=False, kv_connector="c")
    assert policy_of("least_loaded", filters=[CAP]).choose(request, fleet).decode == "a"
    assert policy_of("least_loaded", filters=[{**CAP, "required": True}]).choose(request, fleet).decode == "b"


def test_each_filter_sees_what_the_one_before_left():
    fleet = view_of([d("a", running=9, cached_tokens=90), d("b", cached_tokens=80), d("c")])
    filters_ = [CAP, {"filter": "prefix_affinity"}]
    assert policy_of("least_loaded", filters=filters_).choose(SchedulingRequest(100), fleet).decode == "b"


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ({"filter": "best"}, "unknown name 'best' among filters; known: kv_room, "),
        ({"filter": "role", "parameters": {"rol": "decode"}}, "parameter 'role' of role: Field required"),
        ({"filter": "lora", "parameters": {"a": 1}}, "lora has no parameter 'a'; known: it has none"),
        ({"filter": "lora", "legs": "left"}, r"filters.0.legs: Input should be 'both', 'prefill' or 'decode'"),
        ({"name": "lora"}, r"filters.0.filter: Field required"),
    ],
)
def test_a_wrong_filter_is_refused_by_name(use, message):
    with pytest.raises(InvalidRequest, match=message):
        Filtered.around(policy_of("least_loaded"), [use])


# Scorers


@pytest.mark.parametrize(
    ("name", "column"), [("queue", "waiting"), ("running", "running"), ("predicted_itl", "step_ms")]
)
def test_scorers_that_compare(name, column):
    fleet = [p("a", **{column: 4}), p("b", **{column: 1}), p("c", **{column: 2}), WorkerRow("x", **{column: 100})]
    assert scores(name, fleet)[:3] == [0, 1, 0.6667]
    assert scores(name, fleet[:1]) == [1]


def test_predicted_ttft_scorer():
    fleet = [p("a", queue_ms=9), p("b", load_ms=4), p("c", prefill_ms=1, queue_ms=1)]
    assert scores("predicted_ttft", fleet) == [0, 0.7143, 1]


@pytest.mark.parametrize(
    ("name", "parameters", "state", "score"),
    [
        ("kv_usage", {}, {"kv_usage": 0.3}, 0.7),
        ("prefix", {}, {"cached_tokens": 25}, 0.25),
        ("prefix", {}, {"cached_tokens": 999}, 1),
        ("prefix", {"length_weight": 0.5, "length_scale": 50}, {"cached_tokens": 25}, 0.25),
        ("token_load", {"most_tokens": 400}, {"own_uncached_tokens": 100}, 0.5),
        ("token_load", {"most_tokens": 400}, {"others_uncached_tokens": 999}, 0),
        ("active_requests", {}, {"own_requests": 3}, 0.4),
        ("active_requests", {"most_busy_score": 0.5}, {"own_requests": 3}, 0.2),
        ("active_requests", {"idle": 3}, {"own_requests": 3}, 1),
        ("session", {}, {}, 0),
        ("topology", {}, {}, 1),
        ("lora", {}, {}, 1),
        ("no_hit_lru", {}, {}, 1),
        ("no_hit_lru", {}, {"cached_tokens": 1}, 0.5),
    ],
)
def test_scorers(name, parameters, state, score):
    assert scores(name, [p("a", **state), p("b", own_requests=5, kv_usage=1)], parameters)[0] == score


def test_label_scorers():
    fleet = [
        p("a", labels={"omni.rack": "r", "omni.zone": "z"}),
        d("b", labels={"omni.zone": "z"}),
    ]
    fleet += [d("c", labels={"omni.rack": "r"}), d("d")]
    assert scores("topology", fleet, held_by="a") == [1, 0.05, 0.2, 0]
    assert scores("topology", fleet, {"closeness": {"omni.zone": 0.7}}, held_by="a") == [1, 0.7, 0, 0]


def test_the_lora_scorer_likes_who_has_the_adapter():
    assert scores("lora", [p("a"), d("b", has_adapter=False)], adapter="x") == [1, 0]


def test_the_session_scorer_names_one():
    fleet = [d(name) for name in "abcdef"]
    homes = {tuple(scores("session", fleet, session=f"s{i}")) for i in range(50)}
    assert len(homes) == 6
    assert all(sorted(home) == [0, 0, 0, 0, 0, 1] for home in homes)


# By name


def test_parameters_are_refused_by_name():
    with pytest.raises(
        InvalidRequest, match="prefix_affinity has no parameter 'treshold'; known: affinity_threshold, "
    ) as no:
        policy_of("prefix_affinity", {"treshold": 0.5})
    assert no.value.field == "treshold"
    with pytest.raises(
        InvalidRequest, match=r"parameter 'affinity_threshold' of prefix_affinity: .*less than or equal"
    ):
        policy_of("prefix_affinity", {"affinity_threshold": 2})
    with pytest.raises(InvalidRequest, match="unknown name 'best' among policies; known: cost, "):
        policy_of("best")
    with pytest.raises(InvalidRequest, match="unknown name 'queu' among scorers; known: active_requests, "):
        policy_of("weighted_scorers", {"scorers": [{"name": "queu"}]})


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, shipped in TABLES.items() for name in shipped])
def test_parameters_are_frozen_and_described(kind, name):
    model = TABLES[kind][name].parameters
    assert model.model_config["frozen"]
    assert model.model_config["extra"] == "forbid"


# The manual

MANUAL = (Path(__file__).parents[3] / "docs" / "scheduling-sdk.md").read_text()


def section(title: str) -> str:
    return re.split(r"^## ", MANUAL.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, shipped in TABLES.items() for name in shipped])
def test_the_manual_names_every_parameter(kind, name):
    part = section(kind.capitalize())
    (line,) = [line for line in part.splitlines() if line.startswith(f"| `{name}` |")]
    missing = [field for field in TABLES[kind][name].parameters.model_fields if f"`{field}`" not in line]
    assert not missing or (missing == ["disaggregate_min_tokens"] and "`disaggregate_min_tokens`" in part)


def test_the_manual_names_every_order():
    assert not [name for name in ORDERS if f"`{name}`" not in section("Orders")]


def test_the_examples_of_the_manual_conform_and_choose():
    names: dict = {}
    exec("".join(re.findall(r"```python\n(.*?)```", MANUAL, re.DOTALL)), names)
    names["test_conforms"]()
    fleet = [p("p1", own_uncached_tokens=9), p("p2"), d("d1", kv_usage=0.5), d("d2", kv_usage=0.4)]
    decision = names["ROOMY"].build("roomy", {"full_at": 0.8}).choose(SchedulingRequest(9), view_of(fleet))
    assert (decision.prefill, decision.decode, decision.policy) == ("p2", "d2", "roomy")


# Of other distributions

SOURCE = """
import numpy as np
from omni_proxy.flow.orders import Order
from omni_proxy.scheduling.plugins import NoParameters, Plugin

class Even:
    def __init__(self, parameters): pass
    def keep(self, request, view): return np.arange(len(view)) % 2 == 0
    def score(self, request, view): return (np.arange(len(view)) % 2 == 0).astype(np.float64)

EVEN = Plugin(NoParameters, Even)
LATE = Order(lambda ticket: (-ticket.arrived_s,))
NUMBER = 4
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A distribution with these entry points, as an installer leaves it."""

    def installed(kind: str, points: str) -> None:
        (tmp_path / "acme_even.py").write_text(SOURCE)
        info = tmp_path / "acme_plugins-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-plugins\nVersion: 1.0\n")
        with (info / "entry_points.txt").open("a") as listing:
            listing.write(f"[omni_proxy.{kind}]\n{points}\n")

    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.installed.cache_clear()
    yield installed
    plugins.installed.cache_clear()
    sys.modules.pop("acme_even", None)


def test_an_installed_distribution_is_found(install):
    install("filters", "even = acme_even:EVEN")
    install("scorers", "even = acme_even:EVEN")
    assert set(filters()) == {*FILTERS, "even"}
    assert "even" in scorers()
    assert "even" not in FILTERS
    fleet = view_of([d("a", waiting=1), d("b")])
    policy = policy_of("weighted_scorers", {"scorers": [{"name": "queue"}, {"name": "even", "weight": 2}]})
    assert policy.choose(SchedulingRequest(1), fleet).decode == "a"
    policy = policy_of("least_loaded", filters=[{"filter": "even"}])
    assert policy.choose(SchedulingRequest(1), view_of([d("a", own_requests=1), d("b")])).decode == "a"


@pytest.mark.parametrize(
    ("point", "why"),
    [
        ("even = acme_even:ODD", "AttributeError"),
        ("even = acme_odd:EVEN", "ModuleNotFoundError: No module named 'acme_odd'"),
        ("cost = acme_even:EVEN", "the name is taken by omni-proxy"),
        ("even = acme_even:NUMBER", "it is a int, not a Plugin"),
    ],
)
def test_a_plug_in_that_is_of_no_use_names_its_distribution(install, point, why):
    install("policies", point)
    with pytest.raises(
        FailedPrecondition, match=f"the distribution acme-plugins offers .* omni_proxy.policies .*{why}"
    ):
        policies()


def test_orders_and_predictors_are_found_the_same_way(install):
    install("predictors", "even = acme_even:EVEN")
    install("orders", "late = acme_even:LATE")
    assert set(predictors()) == {*PREDICTORS, "even"}
    assert known_orders()["late"].key(Ticket("r", 3.0, 9.0)) == (-3.0,)


def test_looked_for_once(install, monkeypatch):
    calls = []
    monkeypatch.setattr(plugins, "entry_points", lambda **kind: calls.append(kind) or entry_points(**kind))
    first, second = filters(), filters()
    assert first == second
    assert calls == [{"group": "omni_proxy.filters"}]
    with pytest.raises(TypeError):
        first["mine"] = first["lora"]


@pytest.mark.parametrize("name", SCORERS)
def test_scores_of_a_fleet_that_nobody_is_a_candidate_of(name):
    view = view_of([WorkerRow("a", waiting=3), WorkerRow("b")])
    scored = SCORERS[name].build(name).score(SchedulingRequest(9, session="s", adapter="a"), view)
    assert ((scored >= 0) & (scored <= 1)).all()
    assert np.isfinite(scored).all()
