"""The comparison of expert placement at sizes that take a moment."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placementbench.affinity import SHARES, Fleet, LargeTraffic, TinyTraffic, routings
from placementbench.affinityrun import affinity_block, verdict
from placementbench.contenders import DEEPSEEK, OURS, VLLM, Contender, contenders
from placementbench.families import FAMILIES, TOKENS, Drift, Loads, Shape
from placementbench.goals import goals_of
from placementbench.measure import Cell, Wrong, measure, new_copies, rank_loads
from placementbench.report import blocks_of, notes_of
from placementbench.router import Routed, stretched
from placementbench.shapes import SYSTEMS, Model, System
from placementbench.sharing import sharing_block, sharing_records
from placementbench.texts import KINDS, texts
from sidebyside.tables import markdown

from omni_placement.layout import EMPTY, Layout, Topology
from omni_placement.problem import Problem
from omni_placement.solvers import SOLVERS

SMALL = Model("small", 6, 32, 1000)
PLAIN = System(SMALL, 8)


@pytest.fixture(scope="module")
def routed() -> Routed:
    """Five kinds that each prefer experts of their own."""
    random = np.random.default_rng(3)
    choices = {}
    for kind in KINDS:
        shares = random.dirichlet(np.full(16, 0.5), 4)
        drawn = [random.choice(16, (600, 2), p=row) for row in shares]
        choices[kind] = np.stack(drawn, axis=1).astype(np.int8)
    return Routed(16, choices)


@pytest.fixture(scope="module")
def compared() -> dict[str, Contender]:
    pytest.importorskip("vllm")
    return contenders()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [Shape(6, 32, 8), Shape(4, 256, 288)], ids=["few ranks", "more ranks than experts"])
def test_families_give_whole_tokens_that_drift(family: str, shape: Shape, routed: Routed) -> None:
    drift = FAMILIES[family](shape, np.random.default_rng(1), routed)
    again = FAMILIES[family](shape, np.random.default_rng(1), routed)
    for load, same in zip(_loads(drift), _loads(again), strict=True):
        assert np.array_equal(load, same)
        assert load.shape == (shape.layers, shape.experts)
        assert (load >= 0).all() and (load == np.round(load)).all()
        # vLLM's policy computes in single precision, where whole numbers are exact up to 2^24.
        assert load.max() < 2**24
        np.testing.assert_allclose(load.sum(axis=1), TOKENS, rtol=1e-4)
    moved = [np.abs(load - drift.before).sum() for load in (drift.soon, drift.later)]
    assert 0 < moved[0] < moved[1]


def test_adversarial_layers_can_be_packed_better_than_greedy_does() -> None:
    load = FAMILIES["adversarial"](Shape(3, 32, 8), np.random.default_rng(1), Routed(1, {})).before
    topology = Topology(3, 32, 8, 4)
    greedy = SOLVERS["greedy_lpt"](Problem(topology, load)).rank_loads(load).max(axis=1) / load.mean(axis=1) / 4
    assert greedy[0] > 1.2 and (greedy[1:] > 1.001).all()


def test_stretching_keeps_skew_and_which_experts_kinds_share() -> None:
    random = np.random.default_rng(0)
    counts = np.round(random.lognormal(6, 1, (3, 16)))
    loads = stretched(counts, counts, 256)
    skew = counts.max(axis=1) / counts.mean(axis=1)
    np.testing.assert_allclose(loads.max(axis=1) * 256, skew, rtol=0.15)
    assert (np.diff(loads, axis=1) <= 0).all()
    same = stretched(counts[:, ::-1] * 7, counts[:, ::-1], 256)
    np.testing.assert_allclose(same, loads, rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_the_same_each_time_and_differ_by_kind(kind: str) -> None:
    first, second = (list(itertools.islice(texts(kind, 1), 20)) for _ in range(2))
    assert first == second and all(first)
    others = [list(itertools.islice(texts(other, 1), 20)) for other in KINDS if other != kind]
    assert not any(set(first) & set(other) for other in others)


def test_rank_loads_are_counted_as_the_layout_does() -> None:
    topology = SYSTEMS[0].topology(1)
    load = FAMILIES["zipf"](Shape(58, 256, 32), np.random.default_rng(5), Routed(1, {})).before
    layout = SOLVERS["greedy_lpt"](Problem(topology, load))
    np.testing.assert_allclose(rank_loads(topology, layout.physical, load), layout.rank_loads(load))


def test_an_expert_twice_on_a_rank_has_two_shares_there_and_a_missing_one_is_found() -> None:
    topology = Topology(1, 2, 2, 2)
    load = np.array([[6.0, 1.0]])
    assert rank_loads(topology, np.array([[[0, 0], [0, 1]]], dtype=np.int32), load).tolist() == [[4.0, 3.0]]
    with pytest.raises(Wrong):
        rank_loads(topology, np.array([[[0, 0], [0, EMPTY]]], dtype=np.int32), load)


def test_only_copies_that_a_rank_did_not_hold_are_moves() -> None:
    topology = Topology(1, 4, 2, 3)
    former = np.array([[[0, 1, EMPTY], [2, 3, EMPTY]]], dtype=np.int32)
    assert new_copies(topology, former, np.array([[[1, EMPTY, 0], [3, 2, 2]]], dtype=np.int32)) == 0
    assert new_copies(topology, former, np.array([[[2, 1, 3], [0, 3, EMPTY]]], dtype=np.int32)) == 3


@pytest.mark.parametrize(
    "system",
    [
        pytest.param(PLAIN, id="plain"),
        pytest.param(System(SMALL, 8, hosts=2, groups=4), id="hierarchical"),
        pytest.param(System(SMALL, 8, shared_ranks=2), id="shared-expert ranks"),
        pytest.param(System(SMALL, 12), id="experts do not divide"),
    ],
)
def test_every_contender_is_measured(system: System, routed: Routed, compared: dict[str, Contender]) -> None:
    cells = [Cell(system, extra, family) for extra in (0, 1) for family in ("zipf", "adversarial")]
    records = [_record(cell, measure(cell, compared, routed, 2, seed=1)) for cell in cells]
    for record in records:
        assert set(record["contenders"]) == {*SOLVERS, VLLM}
        for name, figures in record["contenders"].items():
            assert 0 < figures["worst_layer"] <= figures["balance"] <= 1
            assert figures["wall_ms"] > 0 and figures["soon"]["moved_bytes"] % 1000 == 0
            assert name == VLLM or figures["below_bound"] == figures["later"]["below_bound"] == 0
        for name in ("identity", "round_robin"):
            assert record["contenders"][name]["later"]["moved_experts"] == 0
        assert record["contenders"][DEEPSEEK]["later"]["moved_experts"] > 0
        assert record["contenders"][DEEPSEEK]["at_home"] == 1
    lines = [*map(str, goals_of(records)), *notes_of(2, 0.1)]
    text = markdown(blocks_of(records), lines)
    assert system.name in text and ("PASS" in text or "FAIL" in text)


@pytest.mark.parametrize(
    ("change", "met"),
    [
        pytest.param({}, [True, True, True, True, True, True], id="all met"),
        pytest.param({"balance": 0.8}, [False, True, True, True, True, True], id="less even"),
        pytest.param({"gap": 0.09}, [True, False, True, True, True, True], id="gap"),
        pytest.param({"wall_ms": 11.0}, [True, True, False, False, True, True], id="slow"),
        pytest.param({"moved": 40}, [True, True, True, True, True, False], id="moves much"),
        pytest.param({"again": 0.88}, [True, True, True, True, True, False], id="moves little, balances less"),
    ],
)
def test_goals_say_what_is_missed(change: dict[str, float], met: list[bool]) -> None:
    ours = {"balance": 0.9, "gap": 0.04, "wall_ms": 9.0, "moved": 20, "again": 0.9, "soon": 10, **change}
    contenders = {
        OURS: _figures(**ours),
        DEEPSEEK: _figures(0.9, 0.1, 50.0, 100, 0.9),
        VLLM: _figures(0.9, 0.1, 10.0, 100, 0.9),
    }
    record = {"system": "s", "extra": 1, "family": "f", "layers": 58, "slots": 288, "contenders": contenders}
    goals = goals_of([record])
    assert [goal.is_met for goal in goals] == met
    assert [str(goal)[:4] for goal in goals] == ["PASS" if each else "FAIL" for each in met]


def test_a_budget_is_divided_in_every_way(routed: Routed) -> None:
    records = sharing_records(routed, 1, systems=(PLAIN,))
    assert len(records) == 3 * len(FAMILIES)
    for record in records:
        assert record["greedy_lpt"] >= 1
        assert all(1 <= record[way] <= record["none"] + 1e-9 for way in ("all_or_nothing", "same", "shared"))
    assert [row[:2] for row in sharing_block(records).rows] == [
        (PLAIN.name, f"{each:g}") for each in (0.125, 0.25, 0.5)
    ]


@settings(deadline=None)
@given(groups=st.integers(2, 9), title=st.sampled_from(sorted(SHARES)))
def test_every_way_of_routing_serves_every_kind_in_full(groups: int, title: str) -> None:
    shares = SHARES[title]
    for way, routing in routings(KINDS, shares, groups).items():
        for kind, share in zip(KINDS, shares, strict=True):
            assert sum(group.get(kind, 0) for group in routing) == pytest.approx(share)
        if way in ("mixed", "filled"):
            assert all(sum(group.values()) == pytest.approx(1 / groups) for group in routing)


def test_a_step_waits_for_the_slowest_rank_and_copies_share_tokens() -> None:
    """Every token goes to expert 0 and one of 1 to 3: with a copy on both ranks, expert 0 is no bottleneck."""
    one_kind = np.stack([np.zeros((300, 1)), np.tile([[1], [2], [3]], (100, 1))], axis=2).astype(np.int8)
    traffic = TinyTraffic(Routed(4, {"a": one_kind}))
    apart = Layout(Topology(1, 4, 2, 3), np.array([[[0, 1, EMPTY], [2, 3, EMPTY]]], dtype=np.int32))
    copied = Layout(Topology(1, 4, 2, 3), np.array([[[0, 1, EMPTY], [0, 2, 3]]], dtype=np.int32))
    fleet = Fleet(traffic, apart.topology, 1, 3000, SOLVERS["greedy_lpt"])
    random = np.random.default_rng(0)
    figures = [fleet.steps([{"a": 1.0}], [layout], 3, random) for layout in (apart, copied)]
    assert figures[0]["step_load"] == pytest.approx(4 / 3, rel=0.03)
    assert figures[1]["step_load"] == pytest.approx(7 / 6, rel=0.03)
    assert [each["active"] for each in figures] == [2.0, 3.0]
    assert figures[0]["busiest_tokens"] == 1.0


def test_affinity_is_reported_with_what_it_costs(routed: Routed) -> None:
    topology = Topology(4, 16, 4, 5)
    fleet = Fleet(TinyTraffic(routed), topology, 5, 64, SOLVERS["greedy_lpt"])
    records: list[dict[str, Any]] = []
    for way, groups in routings(KINDS, SHARES["uneven"], 5).items():
        figures = fleet.steps(groups, fleet.layouts(groups), 4, np.random.default_rng(1))
        records.append({"model": "m", "extra": 1, "tokens": 64, "shares": "uneven", "way": way, **figures})
        if way == "filled":
            records[-1]["strayed"] = figures["step_load"] * 2
    by_way = {record["way"]: record for record in records}
    assert by_way["own"]["busiest_tokens"] == pytest.approx(2.0)
    assert by_way["own"]["busiest"] > 1.5 * by_way["mixed"]["busiest"]
    assert "left out" in verdict(records) or "helps" in verdict(records)
    assert len(affinity_block(records).rows) == 1


def test_large_traffic_draws_what_it_expects(routed: Routed) -> None:
    traffic = LargeTraffic(routed, 6, 64, 8, seed=0)
    drawn = traffic.step("code", 20_000, np.random.default_rng(0)) / 20_000
    np.testing.assert_allclose(traffic.expected("code").sum(axis=1), 8)
    np.testing.assert_allclose(drawn, traffic.expected("code"), atol=0.03)


def _loads(drift: Drift) -> tuple[Loads, ...]:
    return drift.before, drift.soon, drift.later


def _record(cell: Cell, figures: dict[str, Any]) -> dict[str, Any]:
    topology = cell.system.topology(cell.extra)
    slots = int(topology.capacity.sum())
    return {
        "system": cell.system.name,
        "extra": cell.extra,
        "family": cell.family,
        "layers": topology.num_layers,
        "slots": slots,
        "contenders": figures,
    }


def _figures(balance: float, gap: float, wall_ms: float, moved: int, again: float, soon: int = 100) -> dict[str, Any]:
    return {
        "balance": balance,
        "worst_layer": balance,
        "gap": gap,
        "wall_ms": wall_ms,
        "cpu_ms": wall_ms,
        "soon": {"balance": 0.9, "moved_bytes": soon},
        "later": {"balance": again, "moved_bytes": moved},
    }
