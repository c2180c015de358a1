"""What a problem refuses: the field and the reason tell the caller what cannot be."""

from typing import Any

import numpy as np
import pytest

from omni_common.errors import InvalidRequest
from omni_placement.layout import Layout, Topology
from omni_placement.problem import Problem

TOPOLOGY = Topology(2, 4, 3, 2)


@pytest.mark.parametrize(
    ("parts", "field", "message"),
    [
        pytest.param({"load": np.ones((2, 3))}, "load", "shape", id="load of another shape"),
        pytest.param({"load": -np.ones((2, 4))}, "load.tokens", "not negative", id="negative load"),
        pytest.param({"load": np.full((2, 4), np.nan)}, "load.tokens", "finite", id="no number"),
        pytest.param({"spread": np.ones(4)}, "spread", "(2, 4)", id="spread of another shape"),
        pytest.param({"spread": np.full((2, 4), np.nan)}, "spread", "not negative", id="spread is no number"),
        pytest.param({"budget": -1}, "budget", "not be negative", id="negative budget"),
        pytest.param({"max_replicas": -1}, "max_replicas", "not be negative", id="negative cap"),
        pytest.param({"excluded_ranks": {3}}, "excluded_ranks", "0 to 2", id="unknown rank"),
        pytest.param({"excluded_ranks": {0, 1}}, "excluded_ranks", "2 slots a layer for 4 experts", id="too few ranks"),
        pytest.param({"pinned": ((0, 4, 0),)}, "pinned", "expert 4 of layer 0 on rank 0", id="unknown expert"),
        pytest.param({"pinned": ((0, 0, 1), (0, 1, 1), (0, 2, 1))}, "pinned", "3 experts of layer 0", id="full rank"),
        pytest.param(
            {"pinned": ((1, 0, 1),), "excluded_ranks": {1}},
            "pinned",
            "1 experts of layer 1 on rank 1",
            id="failed rank",
        ),
        pytest.param(
            {"pinned": ((0, 0, 0), (0, 0, 1)), "max_replicas": 1}, "pinned", "2 copies of expert 0", id="over the cap"
        ),
        pytest.param(
            {"pinned": tuple((0, expert, rank) for expert in (0, 1) for rank in range(3))},
            "pinned",
            "no slot for some expert of layer 0",
            id="no room for the others",
        ),
        pytest.param({"pinned": ((0, 0, 0), (0, 0, 1)), "budget": 0}, "budget", "1 copies", id="beyond the budget"),
        pytest.param(
            {"current": Layout(Topology(2, 4, 2, 2), np.array([[[0, 1], [2, 3]]] * 2, dtype=np.int32))},
            "current",
            "other layers, experts, ranks or slots",
            id="layout of another shape",
        ),
    ],
)
def test_what_cannot_be_is_named(parts: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Problem(**{"topology": TOPOLOGY, "load": np.ones((2, 4)), **parts})
    assert refused.value.field == field
    assert message in refused.value.message


def test_limits_follow_from_slots_ranks_and_caps() -> None:
    load = np.ones((2, 4))
    assert Problem(TOPOLOGY, load).extra_replicas == 4
    assert Problem(TOPOLOGY, load, budget=3).extra_replicas == 3
    assert Problem(TOPOLOGY, load, excluded_ranks=frozenset({2})).extra_replicas == 0
    assert Problem(TOPOLOGY, load, max_replicas=1).extra_replicas == 0
    assert Problem(TOPOLOGY, load).replica_limit == 3


def test_a_problem_keeps_its_own_load() -> None:
    load = np.ones((2, 4))
    problem = Problem(TOPOLOGY, load)
    load[0, 0] = 5
    assert problem.load[0, 0] == 1
    assert not problem.load.flags.writeable
