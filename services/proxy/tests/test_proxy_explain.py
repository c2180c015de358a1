"""What the proxy says of its decisions: pages, header, trace, metrics."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from omni_common.errors import Unavailable
from omni_proxy.explain import (
    MAX_HEADER_BYTES,
    Explained,
    Explanations,
    header_value,
    prompt_decision,
    span_attributes,
)
from omni_proxy.phases import Phase, TenantMetrics
from omni_proxy.scheduling.decision import Decision, LegCosts, Prediction, Reason
from omni_proxy.worker import Load

SECRET = "Tell a story"


def decision(workers: int = 4, reason: Reason = Reason.DISAGGREGATED, name: str = "worker") -> Decision:
    rows = np.arange(workers)
    costs = LegCosts(rows, rows[::-1] * 1.5, {"queue_ms": rows * 1.0, "prefill_ms": rows * 2.0})
    ids = tuple(f"{name}-{i}" for i in rows)
    return Decision(ids[-1], ids[0], reason, 512, "cost", ids, costs, costs, prediction=Prediction(1, 2, 3, 4, 0.5))


async def explained(stack: Any, request_id: str, query: str = "") -> Any:
    response = await stack.client.get(f"/decisions/{request_id}{query}")
    assert response.status_code == 200, response.text
    return response.json()


async def ask(stack: Any, request_id: str, **changes: Any) -> Any:
    headers = {"x-request-id": request_id} | changes.pop("headers", {})
    content = {"model": "tiny", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 8} | changes
    response = await stack.client.post("/v1/chat/completions", json=content, headers=headers)
    await stack.until_settled()
    return response


@dataclass
class Account:
    decisions: list[Decision] = field(default_factory=lambda: [decision()])
    prefill_worker: str = ""

    def seen(self) -> Mapping[str, Any]:
        return {"queue_ms": 1.5, "prefill_worker": self.prefill_worker}


def request(request_id: str, sequences: int = 1) -> Explained:
    return Explained(request_id, [Account() for _ in range(sequences)])


def ids(kept: Sequence[Explained]) -> list[str]:
    return [one.request_id for one in kept]


def test_the_oldest_requests_are_forgotten_by_their_sequences() -> None:
    kept = Explanations(max_sequences=5)
    for number in range(3):
        kept.begin(request(f"r{number}", sequences=2))
    assert ids(kept.latest(10)) == ["r2", "r1"] and kept.get("r0") is None
    kept.begin(request("large", sequences=50))
    assert ids(kept.latest(10)) == ["large"]
    kept.begin(request("small"))
    assert ids(kept.latest(10)) == ["small"]


def test_of_equal_ids_the_latest_is_known() -> None:
    kept = Explanations(max_sequences=3)
    for _ in range(100):
        newest = request("same")
        kept.begin(request("other"))
        kept.begin(newest)
    assert kept.get("same") is newest and len(kept) == 2
    assert ids(kept.latest(1)) == ["same"]


def test_candidates_are_cheapest_first_and_as_many_as_asked() -> None:
    page = request("r").to_json(limit=2)
    [sequence] = page["sequences"]
    [explained] = sequence["decisions"]
    assert [c["worker"] for c in explained["candidates"]["prefill"]] == ["worker-3", "worker-2"]
    assert explained["candidates"]["prefill"][0] == {
        "worker": "worker-3", "cost": 0.0, "queue_ms": 3.0, "prefill_ms": 6.0,
    }  # fmt: skip
    assert explained["predicted"]["ttft_ms"] == 3.0 and sequence["seen"]["queue_ms"] == 1.5
    assert len(request("r").to_json()["sequences"][0]["decisions"][0]["candidates"]["decode"]) == 4


@pytest.mark.parametrize(
    ("body", "is_drawn_by_decode"), [({}, False), ({"temperature": 1, "seed": 7}, True), ({"max_tokens": 1}, False)]
)
async def test_what_decode_draws_comes_after_the_handoff(start: Any, body: Any, is_drawn_by_decode: bool) -> None:
    stack = await start("p d", {"policy": "cost"})
    asked = await stack.chat(**body)
    page = (await stack.client.get(f"/decisions/{asked.headers['x-request-id']}")).json()
    [sequence] = page["sequences"]
    foreseen = sequence["decisions"][0]["predicted"]
    handoff_ms = foreseen["transfer_ms"] + foreseen["step_ms"]
    assert sequence["decisions"][0]["reason"] == "disaggregated" and handoff_ms > 0.1
    expected_ms = foreseen["queue_ms"] + foreseen["prefill_ms"] + handoff_ms * is_drawn_by_decode
    assert foreseen["ttft_ms"] == pytest.approx(expected_ms, abs=0.01)


def test_a_seat_is_waited_for_while_the_prompt_is_computed() -> None:
    pair = Prediction(queue_ms=10, prefill_ms=1000, transfer_ms=5, step_ms=20, seat_ms=900, decode_draws_first=True)
    assert pair.ttft_ms == 1035
    assert replace(pair, seat_ms=2000).ttft_ms == 2020
    assert replace(pair, decode_draws_first=False).ttft_ms == pair.computed_ms == 1010
    alone = Prediction(queue_ms=10, prefill_ms=100, step_ms=20, seat_ms=900, is_alone=True)
    assert alone.ttft_ms == alone.computed_ms == 1000


def test_a_summary_has_the_prompts_decision_without_candidates() -> None:
    one = Explained("r", [Account([decision(), decision(reason=Reason.CONTINUED)]), Account()])
    one.ended(200, None, {"ttft_ms": 5.0})
    summary = one.summary()
    assert summary["decision"]["reason"] == "disaggregated" and "candidates" not in summary["decision"]
    assert (summary["num_sequences"], summary["num_decisions"], summary["status"]) == (2, 3, 200)
    assert Explained("r", [Account([])]).summary()["decision"] is None


def test_going_on_is_not_what_computed_the_prompt() -> None:
    first, going_on = decision(), decision(reason=Reason.CONTINUED)
    assert prompt_decision(Account([first, going_on])) is first
    assert prompt_decision(Account([going_on])) is going_on
    assert prompt_decision(Account([])) is None


@pytest.mark.parametrize("answered", ["early-3", "hedge-3"])
def test_of_a_prefill_and_its_hedge_the_decision_is_that_of_the_worker_that_answered(answered: str) -> None:
    decisions = [decision(name="early"), decision(name="hedge"), decision(reason=Reason.CONTINUED)]
    hedged = Account(decisions, prefill_worker=answered)
    assert Explained("r", [hedged]).summary()["decision"]["prefill"] == answered
    assert json.loads(header_value(hedged))["prefill"] == answered


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        pytest.param("w", 3, id="short names: three"),
        pytest.param("w" * 200, 1, id="long names: the best"),
        pytest.param("w" * 500, 0, id="longer names: none"),
        pytest.param("w" * 5_000, None, id="no room at all"),
    ],
)
def test_the_header_is_bounded(name: str, candidates: int | None) -> None:
    value = header_value(Account([decision(workers=64, name=name)]))
    assert len(value) <= MAX_HEADER_BYTES
    content = json.loads(value)
    if candidates is None:
        assert content == {}
    else:
        assert len(content["candidates"]["prefill"]) == candidates and content["reason"] == "disaggregated"


def test_the_header_is_ascii_and_json() -> None:
    value = header_value(Account([decision(name="knoten-ä\n")]))
    assert value.isascii() and value.isprintable()
    assert json.loads(value)["decode"] == "knoten-ä\n-0"
    assert header_value(Account([])) == "{}"


def test_costs_that_are_not_finite_are_null() -> None:
    costs = LegCosts(np.arange(2), np.array([1.0, np.inf]), {"queue_ms": np.array([np.nan, 1.0])})
    endless = Decision(None, "a", Reason.SHORT, 1, "cost", ("a", "b"), alone_costs=costs)
    for text in (header_value(Account([endless])), span_attributes(endless)["omni.candidates"]):
        assert "NaN" not in str(text) and "Infinity" not in str(text)


def test_a_span_has_the_best_five_of_each_leg() -> None:
    attributes = span_attributes(decision(workers=64))
    candidates = json.loads(str(attributes["omni.candidates"]))
    assert {leg: len(found) for leg, found in candidates.items()} == {"prefill": 5, "decode": 5}
    assert attributes["omni.predicted_queue_ms"] == 1.0 and attributes["omni.predicted_confidence"] == 0.5


def test_tenants_past_the_bound_share_a_label() -> None:
    registry = CollectorRegistry()
    tenants = TenantMetrics(registry, max_tenants=2)
    for name in ("", "a", "b", "c", "d", "a"):
        tenants.used(name, 10, 4, 1)

    def value(tenant: str, name: str = "requests") -> float | None:
        return registry.get_sample_value(f"omni_proxy_tenant_{name}_total", {"tenant": tenant})

    assert [value(tenant) for tenant in ("none", "a", "b", "other", "c")] == [1, 2, 1, 2, None]
    assert value("a", "cached_tokens") == 8


async def test_a_request_is_explained_by_its_id(start: Any) -> None:
    stack = await start("p d1 d2")
    await ask(stack, "my/id")
    page = await explained(stack, "my%2Fid")
    assert (page["status"], page["error"], page["tenant"]) == (200, None, "")
    [sequence] = page["sequences"]
    first = sequence["decisions"][0]
    assert (first["policy"], first["reason"], first["prefill"]) == ("least_uncached_tokens", "disaggregated", "p")
    assert {c["worker"] for c in first["candidates"]["decode"]} == {"d1", "d2"}
    seen = sequence["seen"]
    assert (seen["prefill_worker"], seen["decode_worker"]) == ("p", first["decode"])
    assert (seen["queue_ms"], seen["output_tokens"], seen["retries"]) == (1.5, 8, 0)
    assert 0 < seen["ttft_ms"] <= seen["first_token_ms"] <= page["seen"]["e2e_ms"] and seen["step_ms"] > 0
    assert page["seen"]["completion_tokens"] == 8
    assert SECRET not in json.dumps(page) and "token_ids" not in json.dumps(page)
    best = (await explained(stack, "my%2Fid", "?limit=1"))["sequences"][0]["decisions"][0]
    assert len(best["candidates"]["decode"]) == 1


async def test_every_sequence_and_every_attempt_is_explained(start: Any) -> None:
    stack = await start("p1 p2 d")
    stack["p1"].prefill_error = stack["p2"].prefill_error = Unavailable("down")
    await ask(stack, "r", n=2)
    page = await explained(stack, "r")
    assert len(page["sequences"]) == 2
    first = page["sequences"][0]
    tried = [decision["prefill"] for decision in first["decisions"]]
    assert set(tried[:2]) == {"p1", "p2"} and tried[-1] is None
    assert first["seen"]["retries"] == 2 and first["seen"]["first_token_source"] == "decode_alone"


async def test_a_running_request_is_explained_as_far_as_it_has_come(start: Any) -> None:
    stack = await start("d", hold_after=2)
    asked = asyncio.create_task(ask(stack, "r"))
    await asyncio.wait_for(stack["d"].held.wait(), 5)
    page = await explained(stack, "r")
    assert page["status"] is None and page["sequences"][0]["decisions"][0]["decode"] == "d"
    stack["d"].resumed.set()
    await asked
    assert (await explained(stack, "r"))["status"] == 200


async def test_the_latest_requests_are_listed_newest_first(start: Any) -> None:
    stack = await start("d")
    for name in ("a", "b", "c"):
        await ask(stack, name)
    listed = (await stack.client.get("/decisions?limit=2")).json()["decisions"]
    assert [one["request_id"] for one in listed] == ["c", "b"]
    assert listed[0]["decision"]["reason"] == "no_prefill_worker" and "candidates" not in listed[0]["decision"]
    assert listed[0]["seen"]["ttft_ms"] > 0


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        pytest.param("/decisions/nobody", 404, "request_not_found", id="unknown"),
        pytest.param("/decisions?limit=0", 400, "invalid_value", id="none"),
        pytest.param("/decisions?limit=many", 400, "invalid_value", id="no number"),
        pytest.param("/decisions?limit=" + "9" * 5_000, 400, "invalid_value", id="huge"),
    ],
)
async def test_what_cannot_be_explained_is_refused(start: Any, path: str, status: int, code: str) -> None:
    stack = await start("d")
    response = await stack.client.get(path)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code


@pytest.mark.parametrize("stream", [False, True])
async def test_the_decision_comes_in_a_header_when_asked_for(start: Any, stream: bool) -> None:
    stack = await start("p d")
    silent = await ask(stack, "r1", stream=stream)
    assert "x-omni-decision" not in silent.headers
    told = await ask(stack, "r2", stream=stream, headers={"x-omni-explain": "1"})
    decision = json.loads(told.headers["x-omni-decision"])
    assert (decision["prefill"], decision["decode"], decision["reason"]) == ("p", "d", "disaggregated")
    assert decision["candidates"]["prefill"][0]["worker"] == "p"
    assert told.headers["x-request-id"] == "r2"


async def test_a_refusal_has_the_decision_too(start: Any) -> None:
    stack = await start("d", reject=("RESOURCE_EXHAUSTED", "full", ""))
    refused = await ask(stack, "r", headers={"x-omni-explain": "1"})
    assert refused.status_code >= 400
    assert json.loads(refused.headers["x-omni-decision"])["decode"] == "d"
    assert (await explained(stack, "r"))["status"] == refused.status_code


async def test_the_trace_has_each_decision(start: Any) -> None:
    stack = await start("p d")
    await ask(stack, "r")
    [root] = [span for span in stack.spans.get_finished_spans() if span.name == "proxy.request"]
    event = next(event for event in root.events if event.name == "omni.decision")
    facts = event.attributes
    assert (facts["omni.prefill_worker_id"], facts["omni.decision"]) == ("p", "disaggregated")
    assert json.loads(facts["omni.candidates"])["prefill"][0]["worker"] == "p"
    assert SECRET not in str([(e.name, dict(e.attributes)) for e in root.events])


async def test_phases_and_usage_are_measured(start: Any) -> None:
    stack = await start("p d")
    await ask(stack, "r", n=2)

    def observed(phase: Phase) -> float:
        return stack.metric("omni_proxy_phase_seconds_count", phase=phase)

    assert {phase: observed(phase) for phase in Phase if phase is not Phase.TRANSFER} == {
        phase: 2 for phase in Phase if phase is not Phase.TRANSFER
    }
    assert stack.metric("omni_proxy_phase_seconds_sum", phase="first_token") > 0
    assert stack.metric("omni_proxy_phase_seconds_sum", phase="queue") == pytest.approx(0.003)
    assert stack.metric("omni_proxy_tenant_requests_total", tenant="none") == 1
    assert stack.metric("omni_proxy_tenant_output_tokens_total", tenant="none") == 16
    assert stack.metric("omni_proxy_decisions_total", reason="disaggregated", policy="least_uncached_tokens") == 2


async def test_exemplars_lead_to_the_trace_where_the_scraper_takes_openmetrics(start: Any) -> None:
    stack = await start("p d")
    await ask(stack, "r")
    [root] = [span for span in stack.spans.get_finished_spans() if span.name == "proxy.request"]
    plain = await stack.client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain") and "trace_id" not in plain.text
    accept = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
    modern = await stack.client.get("/metrics", headers=accept)
    assert modern.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in text_string_to_metric_families(modern.text)}
    exemplars = [s.exemplar.labels for s in families["omni_proxy_phase_seconds"].samples if s.exemplar]
    assert exemplars and all(labels == {"trace_id": f"{root.context.trace_id:032x}"} for labels in exemplars)
    assert {s.labels["model"] for s in families["omni_proxy_prediction_confidence"].samples} == {
        "prefill", "step", "transfer",
    }  # fmt: skip


async def test_step_times_in_reports_are_set_beside_their_prediction(start: Any) -> None:
    stack = await start("d")
    member = stack.proxy.fleet.get("d")
    assert member is not None
    for steps in (10, 20, 30):
        member.load = Load(running=2, context_tokens=100, steps=steps, busy_ms=15.0 * steps)
    assert stack.metric("omni_proxy_prediction_error_ratio_count", model="step") == 2
