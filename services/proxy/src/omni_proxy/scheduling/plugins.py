"""Plug-ins by name: the shipped ones stand in dict literals, those of other distributions are entry points.

An entry point of the group `omni_proxy.<kind>` names a value of the type the shipped ones have: a `Plugin` for filters,
scorers and policies. Nothing registers itself: a table is the literal and what the installed distributions offer,
looked for once, and is read only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from omni_common.errors import FailedPrecondition, InvalidRequest

KINDS = ("filters", "scorers", "policies", "orders", "predictors")

T = TypeVar("T")


class Parameters(BaseModel):
    """Base of every plug-in's parameters: read once, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NoParameters(Parameters):
    pass


@dataclass(frozen=True, slots=True)
class Plugin(Generic[T]):
    """How one is made from its parameters."""

    parameters: type[BaseModel]
    make: Callable[[Any], T]

    def build(self, name: str, values: Mapping[str, Any] | None = None) -> T:
        """A new one.

        Raises:
            InvalidRequest: a parameter is unknown or wrong; the message names the plug-in, `field` the parameter.
        """
        try:
            return self.make(self.parameters.model_validate(dict(values or {})))
        except ValidationError as refused:
            raise _refusal(name, self.parameters, refused) from refused


def named(kind: str, plugins: Mapping[str, Plugin[T]], name: str) -> Plugin[T]:
    """The one of that name.

    Raises:
        InvalidRequest: there is none; the message lists those there are.
    """
    if name not in plugins:
        raise InvalidRequest(f"unknown name {name!r} among {kind}; known: {', '.join(sorted(plugins))}", field="name")
    return plugins[name]


def table(kind: str, shipped: Mapping[str, T]) -> Mapping[str, T]:
    """The shipped ones and those of installed distributions.

    Raises:
        FailedPrecondition: a distribution's plug-in cannot be loaded, is of another type than the shipped ones, or has
            a name that is taken; the message names the distribution.
    """
    known: dict[str, T] = dict(shipped)
    owners = dict.fromkeys(shipped, "omni-proxy")
    expected: Any = type(next(iter(shipped.values()))) if shipped else object
    for point, loaded in installed(kind):
        if point.name in owners:
            raise _unusable(kind, point, f"the name is taken by {owners[point.name]}")
        if not isinstance(loaded, expected):
            raise _unusable(kind, point, f"it is a {type(loaded).__name__}, not a {expected.__name__}")
        known[point.name], owners[point.name] = loaded, _owner(point)
    return MappingProxyType(known)


@cache
def installed(kind: str) -> tuple[tuple[EntryPoint, Any], ...]:
    """What other distributions offer, imported; by their names, then its own.

    Raises:
        FailedPrecondition: one cannot be imported; the message names the distribution.
    """
    points = sorted(entry_points(group=f"omni_proxy.{kind}"), key=lambda point: (_owner(point), point.name))
    return tuple((point, _imported(kind, point)) for point in points)


def _imported(kind: str, point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # a third party's import may raise anything
        raise _unusable(kind, point, f"{type(error).__name__}: {error}") from error


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown distribution"


def _unusable(kind: str, point: EntryPoint, why: str) -> FailedPrecondition:
    message = f"the distribution {_owner(point)} offers {point.name!r} to omni_proxy.{kind} as {point.value}: {why}"
    return FailedPrecondition(message, field=point.name, reason="plugin_unusable")


def _refusal(name: str, parameters: type[BaseModel], refused: ValidationError) -> InvalidRequest:
    first = refused.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(parameters.model_fields)) or "it has none"
        return InvalidRequest(f"{name} has no parameter {field!r}; known: {known}", field=field)
    return InvalidRequest(f"parameter {field!r} of {name}: {first['msg']}", field=field)
