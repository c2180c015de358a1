"""Typed reading of a parsed JSON object; every refusal names the field by its path."""

import math
from collections.abc import Mapping
from typing import Any

from omni_common.errors import InvalidRequest

_KINDS = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


class Fields:
    """A JSON object. Absent and null fields are the same; unknown ones are nobody's business."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path

    def path(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def raw(self, name: str) -> Any:
        return self._values.get(name)

    def refuse(self, name: str, message: str, reason: str = "invalid_value") -> InvalidRequest:
        """The error to raise for a field."""
        return InvalidRequest(f"{self.path(name)}: {message}", field=self.path(name), reason=reason)

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(name, f"must be true or false, not {kind(value)}", "invalid_type")
        return value

    def integer(self, name: str, low: int | None = None, high: int | None = None) -> int | None:
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(name, f"must be an integer, not {kind(value)}", "invalid_type")
        if (low is not None and value < low) or (high is not None and value > high):
            raise self.refuse(name, f"must be {_range(low, high)}, not {value}")
        return value

    def number(self, name: str, low: float | None = None, high: float | None = None) -> float | None:
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(name, f"must be a number, not {kind(value)}", "invalid_type")
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            raise self.refuse(name, f"must be {_range(low, high)}, not {value}")
        return float(value)

    def text(self, name: str) -> str | None:
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.refuse(name, f"must be a string, not {kind(value)}", "invalid_type")
        return value

    def items(self, name: str) -> list[Any]:
        value = self.raw(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.refuse(name, f"must be a list, not {kind(value)}", "invalid_type")
        return value

    def nested(self, name: str) -> "Fields | None":
        value = self.raw(name)
        if value is None:
            return None
        return as_fields(value, self.path(name))


def as_fields(value: Any, path: str) -> Fields:
    """Raises `InvalidRequest` unless the value is an object."""
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path}: must be an object, not {kind(value)}", field=path, reason="invalid_type")
    return Fields(value, path)


def kind(value: Any) -> str:
    """JSON's name for a value's type."""
    names = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return f"at most {high}"
    return f"at least {low}" if high is None else f"between {low} and {high}"
