"""Filters in front of a policy: each narrows what the next one and the policy see."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from omni_common.errors import InvalidRequest, Unavailable
from omni_proxy.scheduling.decision import RETRY_AFTER_S, Decision, eligible
from omni_proxy.scheduling.filters import filters
from omni_proxy.scheduling.interfaces import Filter, Policy
from omni_proxy.scheduling.plugins import Parameters, named
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.view import Bools, FleetView, Rows


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

    def narrowed(self, request: SchedulingRequest, view: FleetView) -> FleetView:
        """The view without those the filter does not keep.

        Raises:
            Unavailable: no decode worker takes work, or none is left.
        """
        prefills, decodes = eligible(request, view)
        keep = self.filter.keep(request, view)
        narrowed = replace(
            view,
            prefills=self._kept("prefill", view.prefills, keep, prefills),
            decodes=self._kept("decode", view.decodes, keep, decodes),
        )
        if self.required:
            self._require(request, narrowed)
        return narrowed

    def _kept(self, leg: str, mask: Bools, keep: Bools, candidates: Rows) -> Bools:
        is_filtered = self.legs in {"both", leg} and (self.required or keep[candidates].any())
        return mask & keep if is_filtered else mask

    def _require(self, request: SchedulingRequest, view: FleetView) -> None:
        try:
            eligible(request, view)
        except Unavailable as nobody:
            message = f"the filter {self.name} left no decode worker"
            raise Unavailable(message, reason="filtered_out", retry_after_s=RETRY_AFTER_S) from nobody


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
        for step in self.steps:
            view = step.narrowed(request, view)
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
