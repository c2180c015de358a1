"""The solvers to compare with: what their descriptions promise, and DeepSeek's beside the one vLLM ships."""

import importlib.util
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_common.errors import InvalidRequest
from omni_placement.baselines import deepseek_eplb, eplb_replicas, greedy_lpt
from omni_placement.layout import EMPTY, Topology
from omni_placement.problem import Problem

SHAPES = [
    pytest.param(256, 32, 8, 1, 1, id="one copy each"),
    pytest.param(256, 32, 9, 1, 1, id="one spare slot a rank"),
    pytest.param(256, 144, 2, 1, 1, id="two slots a rank"),
    pytest.param(256, 288, 1, 1, 1, id="one slot a rank"),
    pytest.param(256, 288, 3, 1, 1, id="three slots a rank"),
    pytest.param(256, 32, 9, 8, 4, id="hierarchical"),
    pytest.param(256, 32, 9, 4, 4, id="hierarchical, a group a host"),
    pytest.param(60, 12, 7, 1, 1, id="experts that no power of two divides"),
]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Skewed loads, some of them equal or 0, on topologies with and without hosts, groups, shared and failed ranks."""
    hosts, per_host = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    groups = draw(st.sampled_from([1, 2, 3, 4, 6]))
    experts, ranks = groups * draw(st.integers(1, 6)), hosts * per_host
    slots = -(-experts // ranks) + draw(st.integers(0, 4))
    spare = ranks - -(-experts // slots)
    closed = draw(st.lists(st.integers(0, ranks - 1), max_size=spare, unique=True))
    shared = tuple(closed[: draw(st.integers(0, len(closed)))])
    topology = Topology(
        draw(st.integers(1, 3)), experts, ranks, slots, per_host, shared_ranks=shared, num_groups=groups
    )
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    load = random.integers(0, 1 + 4 ** random.integers(0, 8, (topology.num_layers, experts)))
    return Problem(topology, load.astype(np.float64), excluded_ranks=frozenset(closed) - set(shared))


@settings(deadline=None)
@given(problem=problems(), solver=st.sampled_from([deepseek_eplb, greedy_lpt]))
def test_any_problem_is_solved_on_the_ranks_that_may_hold_experts(problem: Problem, solver: Any) -> None:
    layout = solver(problem)
    assert layout.topology == problem.topology
    assert (layout.physical[:, problem.capacity == 0] == EMPTY).all()
    assert solver(problem) == layout


@settings(deadline=None)
@given(problem=problems(), data=st.data())
def test_greedy_lpt_keeps_to_slots_budget_and_cap(problem: Problem, data: st.DataObject) -> None:
    topology = problem.topology
    bounded = Problem(
        topology,
        problem.load,
        budget=data.draw(st.integers(0, 30)),
        excluded_ranks=problem.excluded_ranks,
        max_replicas=data.draw(st.integers(1, 4)),
    )
    replicas = greedy_lpt(bounded).replicas
    assert (replicas.sum(axis=1) - topology.num_experts <= (bounded.budget or 0) // topology.num_layers).all()
    assert replicas.max() <= bounded.max_replicas


def test_greedy_lpt_uses_uneven_ranks() -> None:
    topology = Topology(1, 6, 3, 4, rank_slots=(4, 1, 2))
    layout = greedy_lpt(Problem(topology, np.array([[9.0, 5, 4, 3, 2, 1]])))
    assert (layout.physical != EMPTY).sum(axis=2).tolist() == [[4, 1, 2]]


@pytest.mark.parametrize(("experts", "ranks", "slots", "groups", "hosts"), SHAPES)
def test_deepseek_eplb_replicates_by_largest_share(
    experts: int, ranks: int, slots: int, groups: int, hosts: int
) -> None:
    load = _skewed(8, experts)
    replicas = eplb_replicas(load, ranks * slots, groups, hosts, ranks)
    for row, held in zip(load, replicas.reshape(8, hosts, -1), strict=True):
        for on_host in held:
            present, counts = np.unique(on_host, return_counts=True)
            assert len(present) == experts // hosts
            share = row[present] / counts
            # Its last replica was given to an expert when no other one's share was larger.
            before_last = np.where(counts > 1, row[present] / np.maximum(1, counts - 1), np.inf)
            assert before_last.min() >= share.max()


def test_deepseek_eplb_keeps_groups_on_hosts_where_hosts_divide_them() -> None:
    topology = Topology(8, 256, 32, 9, ranks_per_host=8, num_groups=8)
    layout = deepseek_eplb(Problem(topology, _skewed(8, 256)))
    on_host = layout.indicator.reshape(4, 8, 8, 256).any(axis=1)
    in_group = on_host.reshape(4, 8, 8, 32)
    assert (in_group.all(axis=3) == in_group.any(axis=3)).all()
    assert (in_group.any(axis=3).sum(axis=0) == 1).all()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
@pytest.mark.parametrize(("experts", "ranks", "slots", "groups", "hosts"), SHAPES)
def test_deepseek_eplb_balances_as_the_policy_in_vllm(
    experts: int, ranks: int, slots: int, groups: int, hosts: int
) -> None:
    import torch
    from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

    load = _skewed(12, experts)
    theirs = DefaultEplbPolicy.rebalance_experts(torch.from_numpy(load), ranks * slots, groups, hosts, ranks)
    ours = eplb_replicas(load, ranks * slots, groups, hosts, ranks)
    np.testing.assert_array_equal(_rank_loads(ours, load, ranks), _rank_loads(theirs.numpy(), load, ranks))


@pytest.mark.parametrize(("ranks", "slots"), [(32, 9), (32, 10), (64, 5), (288, 2)])
def test_deepseek_eplb_balances_as_well_though_a_rank_holds_an_expert_once(ranks: int, slots: int) -> None:
    load = _skewed(12, 256)
    raw = _rank_loads(eplb_replicas(load, ranks * slots, 1, 1, ranks), load, ranks)
    layout = deepseek_eplb(Problem(Topology(12, 256, ranks, slots), load))
    assert layout.balancedness(load).mean() == pytest.approx((raw.mean(axis=1) / raw.max(axis=1)).mean(), rel=0.005)


@pytest.mark.parametrize(
    ("solver", "fields", "field"),
    [
        pytest.param(greedy_lpt, {"pinned": ((0, 0, 0),)}, "pinned", id="lpt, pins"),
        pytest.param(deepseek_eplb, {"pinned": ((0, 0, 0),)}, "pinned", id="eplb, pins"),
        pytest.param(deepseek_eplb, {"max_replicas": 1}, "max_replicas", id="eplb, cap"),
        pytest.param(deepseek_eplb, {"budget": 0}, "budget", id="eplb, slots that do not divide"),
        pytest.param(
            deepseek_eplb,
            {"topology": Topology(1, 5, 2, 4, rank_slots=(4, 3))},
            "topology.rank_slots",
            id="eplb, uneven ranks",
        ),
    ],
)
def test_what_a_baseline_does_not_know_is_refused_by_field(solver: Any, fields: dict[str, Any], field: str) -> None:
    values = {"topology": Topology(1, 5, 2, 4), "load": np.ones((1, 5)), **fields}
    with pytest.raises(InvalidRequest) as refused:
        solver(Problem(**values))
    assert (refused.value.field, refused.value.reason) == (field, "unsupported")


def _skewed(layers: int, experts: int) -> npt.NDArray[np.float64]:
    """Whole tokens, few enough that their sums are exact in single precision, which vLLM's policy computes in."""
    return np.round(np.random.default_rng(7).lognormal(8.0, 1.0, (layers, experts)))


def _rank_loads(replicas: npt.NDArray[np.int64], load: npt.NDArray[np.float64], ranks: int) -> Any:
    counts = np.stack([np.bincount(row, minlength=load.shape[1]) for row in replicas])
    return np.take_along_axis(load / counts, replicas, axis=1).reshape(len(load), ranks, -1).sum(axis=2)
