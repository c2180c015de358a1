"""What the proxy says of its decisions: pages, header, trace, metrics."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from omni_proxy.explain import (
    MAX_HEADER_BYTES,
    Explained,
    Explanations,
    header_value,
    prompt_decision,
    span_attributes,
)
from omni_proxy.phases import TenantMetrics
from omni_proxy.scheduling.decision import Decision, LegCosts, Prediction, Reason

SECRET = "Tell a story"


def decision(workers: int = 4, reason: Reason = Reason.DISAGGREGATED, name: str = "worker") -> Decision:
    rows = np.arange(workers)
    costs = LegCosts(rows, rows[::-1] * 1.5, {"queue_ms": rows * 1.0, "prefill_ms": rows * 2.0})
    ids = tuple(f"{name}-{i}" for i in rows)
    return Decision(ids[-1], ids[0], reason, 512, "cost", ids, costs, costs, prediction=Prediction(1, 2, 3, 4, 0.5))


@dataclass
class Account:
    decisions: list[Decision] = field(default_factory=lambda: [decision()])

    def seen(self) -> Mapping[str, Any]:
        return {"queue_ms": 1.5}


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
    assert explained["predicted"]["ttft_ms"] == 3.0 and sequence["seen"] == {"queue_ms": 1.5}
    assert len(request("r").to_json()["sequences"][0]["decisions"][0]["candidates"]["decode"]) == 4


def test_a_summary_has_the_prompts_decision_without_candidates() -> None:
    one = Explained("r", [Account([decision(), decision(reason=Reason.CONTINUED)]), Account()])
    one.ended(200, None, {"ttft_ms": 5.0})
    summary = one.summary()
    assert summary["decision"]["reason"] == "disaggregated" and "candidates" not in summary["decision"]
    assert (summary["num_sequences"], summary["num_decisions"], summary["status"]) == (2, 3, 200)
    assert Explained("r", [Account([])]).summary()["decision"] is None


def test_going_on_is_not_what_computed_the_prompt() -> None:
    first, going_on = decision(), decision(reason=Reason.CONTINUED)
    assert prompt_decision([first, going_on]) is first
    assert prompt_decision([going_on]) is going_on
    assert prompt_decision([]) is None


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
    value = header_value([decision(workers=64, name=name)])
    assert len(value) <= MAX_HEADER_BYTES
    content = json.loads(value)
    if candidates is None:
        assert content == {}
    else:
        assert len(content["candidates"]["prefill"]) == candidates and content["reason"] == "disaggregated"


def test_the_header_is_ascii_and_json() -> None:
    value = header_value([decision(name="knoten-ä\n")])
    assert value.isascii() and value.isprintable()
    assert json.loads(value)["decode"] == "knoten-ä\n-0"
    assert header_value([]) == "{}"


def test_costs_that_are_not_finite_are_null() -> None:
    costs = LegCosts(np.arange(2), np.array([1.0, np.inf]), {"queue_ms": np.array([np.nan, 1.0])})
    endless = Decision(None, "a", Reason.SHORT, 1, "cost", ("a", "b"), alone_costs=costs)
    for text in (header_value([endless]), span_attributes(endless)["omni.candidates"]):
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
