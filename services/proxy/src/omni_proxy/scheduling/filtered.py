"""Filters in front of a policy: each narrows what the next one and the policy see."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from omni_common.errors import InvalidRequest, Unavailable
from omni_proxy.scheduling.decision import RETRY_AFTER_S, Decision
from omni_proxy.scheduling.filters import filters
from omni_proxy.scheduling.interfaces import Filter, Policy
from omni_proxy.scheduling.plugins import Parameters, named
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.view import Bools, FleetView


class FilterUse(Parameters):
    """One filter of a configuration."""

    filter: str
    parameters: Mapping[str, Any] = Field(default_factory=dict)
    legs: Literal["both", "prefill", "decode"] = "both"
    required: bool = Field(
        False,
        description="A leg nobody would be left for: false, is not filtered; true, has nobody",
    )


_USES = TypeAdapter(tuple[FilterUse, ...])


@dataclass(frozen=True, slots=True)
class Step:
    name: str
    filter: Filter
    legs: Literal["both", "prefill", "decode"] = "both"
    required: bool = False

    def narrowed(self, request: SchedulingRequest, view: FleetView, allowed: Bools) -> FleetView:
        keep = self.filter.keep(request, view)
        prefills, decodes = view.prefills, view.decodes
        if self.legs != "decode" and (self.required or (prefills & keep & allowed).any()):
            prefills = prefills & keep
        if self.legs != "prefill" and (self.required or (decodes & keep & allowed).any()):
            decodes = decodes & keep
        return replace(view, prefills=prefills, decodes=decodes)


@dataclass(frozen=True, slots=True)
class Filtered:
    """A policy that sees what the filters leave. Where they leave no prefill worker, decode goes alone."""

    policy: Policy
    steps: tuple[Step, ...] = field(default=())

    @classmethod
    def around(cls, policy: Policy, uses: Sequence[FilterUse | Mapping[str, Any]]) -> "Filtered":
        """Filters made from a configuration.

        Raises:
            InvalidRequest: an unknown name or parameter, or a wrong value.
        """
        return cls(policy, tuple(_step(use) for use in _read(uses)))

    def choose(self, request: SchedulingRequest, view: FleetView) -> Decision:
        allowed = np.ones(len(view), np.bool_)
        if request.excluded:
            allowed = np.array([worker not in request.excluded for worker in view.ids], np.bool_)
        for step in self.steps:
            could_decode = (view.decodes & allowed).any()
            view = step.narrowed(request, view, allowed)
            if could_decode and not (view.decodes & allowed).any():
                message = f"the filter {step.name} left no decode worker"
                raise Unavailable(message, reason="filtered_out", retry_after_s=RETRY_AFTER_S)
        return self.policy.choose(request, view)


def _read(uses: Sequence[FilterUse | Mapping[str, Any]]) -> tuple[FilterUse, ...]:
    try:
        return _USES.validate_python(tuple(uses))
    except ValidationError as refused:
        first = refused.errors(include_url=False, include_input=False)[0]
        field_name = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"filters.{field_name}: {first['msg']}", field=f"filters.{field_name}") from refused


def _step(use: FilterUse) -> Step:
    made = named("filters", filters(), use.filter).build(use.filter, use.parameters)
    return Step(use.filter, made, use.legs, use.required)
