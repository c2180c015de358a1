"""Calls of our ops that are wrong in one named way, drawn from the samples by a seed, and which gate refuses each."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from omni_kernels.case import Case, Op
from omni_kernels.conformance import parameters
from omni_kernels.contract.faults import FAULTS, SIGNATURE_FAULTS, TABLE
from omni_kernels.ops import OPS

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class WrongCall:
    """`op` called as in a sample, but for `fault` in `argument` (empty where the fault is in none)."""

    op: str
    argument: str
    fault: str
    case: str
    inputs: tuple[Any, ...]
    named: Mapping[str, Any]

    def __str__(self) -> str:
        where = f" {self.argument}" if self.argument else ""
        return f"{self.op}:{where} {self.fault} ({self.case})"


@dataclass(frozen=True, slots=True)
class Refusal:
    """The gate that refused a call, "schema" or "validator", and its words; no gate means the call went through."""

    gate: str
    message: str


def draw(seed: int, count: int) -> list[WrongCall]:
    """`count` wrong calls, all different, dealt to the ops in turn; the same for the same seed."""
    chance = random.Random(seed)
    hands = [_shuffled(op, chance) for op in OPS.values()]
    drawn: list[WrongCall] = []
    while hands and len(drawn) < count:
        for hand in list(hands):
            call = next(hand, None)
            if call is None:
                hands.remove(hand)
            elif len(drawn) < count:
                drawn.append(call)
    return drawn


def _shuffled(op: Op[..., Any], chance: random.Random) -> Iterator[WrongCall]:
    names = parameters(op)
    faults = [(argument, fault) for argument, faults in TABLE.get(op.name, {}).items() for fault in faults]
    faults += [("", fault) for fault in SIGNATURE_FAULTS]
    chance.shuffle(faults)
    cases = _cases(op.name)
    for argument, fault in faults:
        able = [case for case in cases if not argument or case.inputs[names.index(argument)] is not None]
        yield _wrong(op, chance.choice(able), names, argument, fault)


def _wrong(op: Op[..., Any], case: Case, names: Sequence[str], argument: str, fault: str) -> WrongCall:
    if not argument:
        inputs, named = SIGNATURE_FAULTS[fault](case.inputs, names)
        return WrongCall(op.name, argument, fault, case.name, inputs, named)
    place = names.index(argument)
    inputs = (*case.inputs[:place], FAULTS[fault](case.inputs[place]), *case.inputs[place + 1 :])
    return WrongCall(op.name, argument, fault, case.name, inputs, {})


@cache
def _cases(name: str) -> Sequence[Case]:
    """The first samples that have more than one of everything, until each argument is given in two of them."""
    places = [parameters(OPS[name]).index(argument) for argument in TABLE.get(name, {})]
    cases: list[Case] = []
    for case in OPS[name].samples(CPU):
        if all(min(value.shape, default=2) > 1 for value in case.inputs if isinstance(value, Tensor)):
            cases.append(case)
        if all(sum(case.inputs[place] is not None for case in cases) > 1 for place in places):
            break
    return cases


def refusal(call: WrongCall, check: Callable[..., None] | None = None) -> Refusal:
    """Which gate refuses `call`: torch by the op's schema, or the op's validator (`check` stands for it if given)."""
    schema = getattr(torch.ops.omni, call.op).default._schema
    try:
        torch._C._check_schema_allow_fake_script_object(schema, *call.inputs, **call.named)
    except RuntimeError as error:
        return Refusal("schema", str(error).splitlines()[0])
    try:
        (check or OPS[call.op].check)(*call.inputs, **call.named)
    except ValueError as error:
        return Refusal("validator", str(error))
    return Refusal("", "")
