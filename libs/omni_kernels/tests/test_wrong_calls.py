"""Calls that are wrong in one way are refused, whatever the op, before a kernel sees them."""

from collections import Counter

import pytest
import torch

from omni_kernels.conformance import parameters
from omni_kernels.contract.faults import TABLE
from omni_kernels.contract.wrong_calls import WrongCall, draw, refusal
from omni_kernels.ops import OPS

SEED = 6


@pytest.fixture(scope="module")
def calls() -> list[WrongCall]:
    return draw(SEED, 100)


def test_a_hundred_wrong_calls_are_refused(calls: list[WrongCall]) -> None:
    refusals = {str(call): refusal(call) for call in calls}
    assert len(refusals) == 100
    assert [call for call, refused in refusals.items() if not refused.gate] == []
    gates = Counter(refused.gate for refused in refusals.values())
    assert gates["validator"] > gates["schema"] > 0


def test_every_op_is_called_wrongly_in_several_ways(calls: list[WrongCall]) -> None:
    assert min(Counter(call.op for call in calls)[name] for name in OPS) >= 3


def test_the_same_seed_gives_the_same_calls(calls: list[WrongCall]) -> None:
    assert [str(call) for call in draw(SEED, 100)] == [str(call) for call in calls]
    assert [str(call) for call in draw(SEED + 1, 100)] != [str(call) for call in calls]


def test_validators_name_the_argument(calls: list[WrongCall]) -> None:
    for call in calls:
        refused = refusal(call)
        if refused.gate == "validator":
            assert refused.message.partition(":")[0] in parameters(OPS[call.op]), f"{call}: {refused.message}"


def test_the_public_call_refuses_them_too(calls: list[WrongCall]) -> None:
    for call in calls:
        with pytest.raises((ValueError, TypeError, AttributeError, RuntimeError)):
            OPS[call.op].call(*call.inputs, **call.named)


def test_every_wrong_call_there_is_is_refused() -> None:
    assert set(TABLE) == set(OPS)
    calls = draw(SEED, 10_000)
    assert [str(call) for call in calls if not refusal(call).gate] == []
    unchecked = {call.op for call in calls if not refusal(call, check=lambda *_, **__: None).gate}
    assert unchecked == set(OPS), "without its validator every op lets some through"


def test_the_samples_themselves_are_not_refused() -> None:
    for op in OPS.values():
        case = next(iter(op.samples(torch.device("cpu"))))
        assert not refusal(WrongCall(op.name, "", "none", case.name, case.inputs, {})).gate
