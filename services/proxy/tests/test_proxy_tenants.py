"""Keys, tenants, headers, rates and quotas, with clocks that are set by hand."""

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from omni_common.errors import InvalidRequest, OmniError, ResourceExhausted, Unauthenticated
from omni_proxy import tenants as tenants_module
from omni_proxy.flow.metrics import FlowMetrics
from omni_proxy.quotas import Bucket, span_of
from omni_proxy.scheduling.request import NO_SLO, Caller, Slo
from omni_proxy.tenants import Tenants, TenantSettings, Visit

DAY = 86_400.0


class Bench:
    """Tenants and the clocks they read."""

    def __init__(self, *tenants: dict[str, Any], slo: Slo = NO_SLO) -> None:
        self.now, self.wall = 1000.0, 10 * DAY + 3600
        self.registry = CollectorRegistry()
        metrics = FlowMetrics(self.registry)
        self.tenants = Tenants(settings(*tenants), slo, metrics, lambda: self.now, lambda: self.wall)

    def pass_s(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds

    def enter(self, name: str = "a") -> Visit:
        return self.tenants.enter(Caller(name))

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


def settings(*tenants: dict[str, Any]) -> tuple[TenantSettings, ...]:
    return tuple(TenantSettings.model_validate(t) for t in tenants)


def refusal(step: Any, *args: Any) -> OmniError:
    with pytest.raises(ResourceExhausted) as refused:
        step(*args)
    return refused.value


KEYED = (
    {"name": "gold", "keys": [{"key": "sk-gold"}, {"sha256": hashlib.sha256(b"sk-gold-2").hexdigest()}], "weight": 3},
    {"name": "free", "keys": [{"key_env": "FREE_KEY"}], "priority": -10},
)


@pytest.fixture(autouse=True)
def free_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREE_KEY", "sk-free")


@pytest.mark.parametrize(
    ("headers", "tenant"),
    [
        ({"authorization": "Bearer sk-gold"}, "gold"),
        ({"authorization": "bearer  sk-gold-2"}, "gold"),
        ({"x-api-key": "sk-free"}, "free"),
        ({"authorization": "Bearer sk-free", "x-omni-tenant": "gold"}, "free"),
    ],
)
def test_a_key_names_its_tenant(headers, tenant):
    caller = Bench(*KEYED).tenants.caller_of(headers)
    assert caller.tenant == tenant
    assert (caller.weight, caller.priority) == ((3, 0) if tenant == "gold" else (1, -10))


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, "missing_api_key"),
        ({"authorization": "Basic sk-gold"}, "missing_api_key"),
        ({"authorization": "Bearer "}, "missing_api_key"),
        ({"authorization": "Bearer sk-gol"}, "invalid_api_key"),
        ({"authorization": "Bearer sk-gold\u00e9"}, "invalid_api_key"),
        ({"x-omni-tenant": "gold"}, "missing_api_key"),
    ],
)
def test_without_a_known_key_nobody_is_let_in(headers, reason):
    with pytest.raises(Unauthenticated) as refused:
        Bench(*KEYED).tenants.caller_of(headers)
    assert refused.value.reason == reason and "sk-" not in refused.value.message


def test_every_digest_is_compared_whichever_matches(monkeypatch):
    compared: list[bytes] = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return given == known

    monkeypatch.setattr(tenants_module.hmac, "compare_digest", compare)
    bench = Bench(*KEYED)
    for key in ("sk-gold", "sk-free", "unknown"):
        compared.clear()
        try:
            bench.tenants.caller_of({"x-api-key": key})
        except Unauthenticated:
            assert key == "unknown"
        assert len(compared) == 3


@pytest.mark.parametrize(
    "key", [{}, {"key": "a", "key_env": "FREE_KEY"}, {"key_env": "NOT_SET_ANYWHERE"}, {"sha256": "abc"}, {"key": ""}]
)
def test_keys_that_cannot_be_meant(key):
    with pytest.raises(ValidationError):
        TenantSettings.model_validate({"name": "a", "keys": [key]})


@pytest.mark.parametrize("key", [{"key": " sk"}, {"key_env": "FREE_KEY"}])
def test_a_key_that_no_header_can_bring_is_refused_unprinted(monkeypatch, key):
    """A file's last line end in a variable let nobody in, and nothing said why."""
    monkeypatch.setenv("FREE_KEY", "sk-free\n")
    with pytest.raises(ValidationError, match="begins or ends with white space") as refused:
        TenantSettings.model_validate({"name": "a", "keys": [key]})
    assert "sk" not in str(refused.value.errors(include_input=False))


def test_a_key_is_not_in_what_is_printed():
    tenant = settings(KEYED[0])[0]
    assert "sk-gold" not in repr(tenant) and "sk-gold" not in tenant.model_dump_json()


@pytest.mark.parametrize("name", ["x-omni-tenant", "x-llm-d-inference-fairness-id"])
def test_without_keys_the_header_names_the_tenant(name):
    bench = Bench({"name": "a", "weight": 2}, {"name": "*", "weight": 0.5})
    assert bench.tenants.caller_of({name: "a"}).weight == 2
    assert bench.tenants.caller_of({name: "other"}) == Caller("other", weight=0.5)
    assert bench.tenants.caller_of({}).tenant == ""


def test_what_headers_promise():
    bench = Bench({"name": "a", "max_priority": 5}, slo=Slo(900, 90))
    assert bench.tenants.caller_of({"x-omni-tenant": "a"}) == Caller("a", slo=Slo(900, 90))
    headers = {
        "x-omni-tenant": "a", "x-omni-priority": "-7", "x-omni-ttft-slo-ms": "250.5", "x-llm-d-slo-tpot-ms": "20",
        "x-omni-session": "s-1",
    }  # fmt: skip
    assert bench.tenants.caller_of(headers) == Caller("a", -7, 1.0, Slo(250.5, 20), "s-1")


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-omni-tenant", ""),
        ("x-omni-tenant", "a b"),
        ("x-llm-d-inference-fairness-id", "a" * 65),
        ("x-omni-priority", "high"),
        ("x-omni-priority", "1.5"),
        ("x-omni-priority", "101"),
        ("x-omni-priority", "\u0661"),
        ("x-omni-ttft-slo-ms", "0"),
        ("x-omni-ttft-slo-ms", "-1"),
        ("x-omni-ttft-slo-ms", "nan"),
        ("x-omni-itl-slo-ms", "inf"),
        ("x-llm-d-slo-ttft-ms", "soon"),
        ("x-omni-session", "two words"),
        ("x-omni-session", "s" * 129),
    ],
)
def test_a_malformed_header_is_named(header, value):
    with pytest.raises(InvalidRequest) as refused:
        Bench().tenants.caller_of({header: value})
    assert refused.value.field == header and header in refused.value.message


def test_no_priority_above_the_tenants_own_most():
    bench = Bench({"name": "a", "priority": 1}, {"name": "b", "max_priority": 10})
    assert bench.tenants.caller_of({"x-omni-tenant": "b", "x-omni-priority": "10"}).priority == 10
    for name, value in (("a", "2"), ("b", "11")):
        with pytest.raises(InvalidRequest, match="at most"):
            bench.tenants.caller_of({"x-omni-tenant": name, "x-omni-priority": value})


@given(st.dictionaries(st.sampled_from(["x-omni-priority", "x-omni-ttft-slo-ms", "x-omni-session"]), st.text()))
def test_any_header_is_read_or_refused(headers):
    try:
        caller = Bench().tenants.caller_of(headers)
    except InvalidRequest as error:
        assert error.field in headers
    else:
        assert -100 <= caller.priority <= 100 and (caller.slo.ttft_ms or 1) > 0


def test_requests_per_minute():
    bench = Bench({"name": "a", "requests_per_minute": 6})
    for _ in range(6):
        bench.enter().end()
    error = refusal(bench.enter)
    assert error.reason == "requests_per_minute" and error.retry_after_s == pytest.approx(10)
    bench.enter("b").end()
    bench.pass_s(error.retry_after_s)
    bench.enter().end()
    assert bench.metric("omni_proxy_tenant_refusals_total", tenant="a", reason="requests_per_minute") == 1
    assert bench.metric("omni_proxy_dropped_total", reason="requests_per_minute") == 1


def test_fewer_than_one_request_per_minute() -> None:
    bench = Bench({"name": "a", "requests_per_minute": 0.5})
    bench.enter()
    assert refusal(bench.enter).retry_after_s == pytest.approx(120)
    bench.pass_s(120)
    bench.enter()


def test_who_is_configured_later_or_not_any_more_keeps_what_was_used() -> None:
    bench, limited = Bench(), {"name": "a", "max_inflight": 2}
    visits = [bench.enter(), bench.enter()]
    for configured in ([limited], [], [limited]):
        bench.tenants.reconfigure(settings(*configured), NO_SLO)
        if configured:
            assert refusal(bench.enter).reason == "tenant_in_flight"
    for visit in visits:
        visit.end()
    bench.enter()


def test_requests_in_flight_end_once():
    bench = Bench({"name": "a", "max_inflight": 1})
    visit = bench.enter()
    assert refusal(bench.enter).reason == "tenant_in_flight"
    visit.end()
    visit.end()
    bench.enter()
    assert refusal(bench.enter).reason == "tenant_in_flight"


def test_tokens_are_charged_as_expected_and_settled_as_used():
    bench = Bench({"name": "a", "tokens_per_minute": 1000})
    first = bench.enter()
    first.charge(900)
    error = refusal(bench.enter().charge, 300)
    assert error.reason == "tokens_per_minute" and error.retry_after_s == pytest.approx(12)
    first.end(150)
    bench.enter().charge(850)
    assert first.headers["x-ratelimit-remaining-tokens"] == "0"


def test_more_than_expected_is_a_debt():
    bench = Bench({"name": "a", "tokens_per_minute": 600})
    visit = bench.enter()
    visit.charge(600)
    visit.end(1200)
    assert refusal(bench.enter().charge, 10).retry_after_s == pytest.approx(61)


@pytest.mark.parametrize("limit", ["tokens_per_minute", "tokens_per_day"])
def test_what_never_fits_is_refused_without_a_time_to_retry(limit):
    error = refusal(Bench({"name": "a", limit: 10}).enter().charge, 11)
    assert error.reason == limit and error.retry_after_s is None


def test_tokens_of_a_day_end_at_midnight():
    bench = Bench({"name": "a", "tokens_per_day": 100})
    bench.enter().charge(90)
    error = refusal(bench.enter().charge, 11)
    assert error.reason == "tokens_per_day" and error.retry_after_s == pytest.approx(23 * 3600)
    bench.pass_s(23 * 3600)
    bench.enter().charge(100)


def test_what_was_charged_yesterday_is_not_given_back_today():
    bench = Bench({"name": "a", "tokens_per_day": 100})
    late = bench.enter()
    late.charge(90)
    bench.pass_s(23 * 3600)
    bench.enter().charge(95)
    late.end(5)
    assert refusal(bench.enter().charge, 6).reason == "tokens_per_day"
    bench.enter().charge(5)


def test_a_clock_that_is_set_back_over_midnight_gives_no_second_day():
    bench = Bench({"name": "a", "tokens_per_day": 100})
    bench.pass_s(23 * 3600)
    bench.enter().charge(100)
    bench.wall -= 2
    assert refusal(bench.enter().charge, 1).reason == "tokens_per_day"
    bench.wall += 2
    assert refusal(bench.enter().charge, 1).reason == "tokens_per_day"
    bench.wall -= 365 * 86_400
    bench.enter().charge(100)


def test_rates_are_told_like_openais():
    bench = Bench({"name": "a", "requests_per_minute": 60, "tokens_per_minute": 6000})
    visit = bench.enter()
    visit.charge(3000)
    assert visit.headers == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "3000",
        "x-ratelimit-reset-tokens": "30s",
    }
    assert bench.tenants.rate_headers(Caller("nobody")) == {}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.02, "20ms"), (1.5, "1.5s"), (59, "59s"), (60, "1m0s"), (361.25, "6m1.25s")]
)
def test_spans(seconds, text):
    assert span_of(seconds) == text


def test_limits_of_any_hold_for_each_name_on_its_own():
    bench = Bench({"name": "*", "requests_per_minute": 1})
    for name in ("x", "y", ""):
        bench.enter(name)
        assert refusal(bench.enter, name).reason == "requests_per_minute"
    assert bench.metric("omni_proxy_tenant_refusals_total", tenant="other", reason="requests_per_minute") == 3


def test_names_of_clients_fill_no_memory():
    bench = Bench({"name": "*", "max_inflight": 1})
    kept = bench.enter("kept")
    for number in range(3000):
        bench.enter(f"n{number}").end()
    assert bench.tenants.remembered <= 1024
    assert refusal(bench.enter, "kept").reason == "tenant_in_flight"
    kept.end()


def test_other_limits_while_running_keep_what_was_used():
    bench = Bench({"name": "a", "requests_per_minute": 10, "max_inflight": 5}, {"name": "gone"})
    visits = [bench.enter() for _ in range(4)]
    leaving = bench.enter("gone")
    bench.tenants.reconfigure(settings({"name": "a", "requests_per_minute": 5, "max_inflight": 5}), NO_SLO)
    visits.append(bench.enter())
    assert refusal(bench.enter).reason == "tenant_in_flight"
    for visit in (*visits, leaving):
        visit.end()
    assert refusal(bench.enter).reason == "requests_per_minute"


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 30)), max_size=40))
def test_a_bucket_gives_no_more_than_its_rate(takes):
    bucket, now, taken = Bucket(60, 0.0), 0.0, 0.0
    for amount, pause in takes:
        now += pause
        if not bucket.seconds_until(amount, now):
            bucket.take(amount, now)
            taken += amount
    assert taken <= 60 + now + 1e-6
