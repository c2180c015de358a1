"""The scheduler's configuration: one YAML file, checked whole, read again when it changes.

python -m omni_proxy.schedule_config FILE    checks a file and prints the effective values as JSON
"""

import hashlib
import json
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from omni_common.errors import InvalidRequest, OmniError
from omni_proxy.flow.settings import FlowSettings
from omni_proxy.health import HealthSettings
from omni_proxy.hedging import HedgingSettings
from omni_proxy.names import known_name
from omni_proxy.scheduling.filtered import FilterUse
from omni_proxy.scheduling.filters import filters as known_filters
from omni_proxy.scheduling.interfaces import Policy
from omni_proxy.scheduling.plugins import Plugin
from omni_proxy.scheduling.policies import policies as known_policies
from omni_proxy.scheduling.policies import policy_of
from omni_proxy.scheduling.predictors import MakePredictor
from omni_proxy.scheduling.predictors import predictors as known_predictors
from omni_proxy.scheduling.request import Slo
from omni_proxy.tenants import KEYS_ELSEWHERE, TenantSettings

_SHOWN_DIGITS = 8


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping: the first one would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _PlugInSettings(_Section):
    """A plug-in by name; parameters are its own. The name alone stands for a plug-in without parameters."""

    known: ClassVar[Callable[[], Mapping[str, Plugin[Any]]]]

    name: str
    parameters: Mapping[str, Any] = Field(default_factory=dict, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: object) -> object:
        return {"name": given} if isinstance(given, str) else given

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return known_name(name, cls.known())

    @field_validator("parameters")
    @classmethod
    def _fitting(cls, values: Mapping[str, Any], info: ValidationInfo) -> Mapping[str, Any]:
        if (name := info.data.get("name")) is not None:
            try:
                cls.known()[name].build(name, values)
            except OmniError as error:
                raise ValueError(error.message) from None
            except Exception as error:  # a third party's may raise anything
                raise ValueError(f"{name} cannot be made: {type(error).__name__}: {error}") from error
        return values


class PolicySettings(_PlugInSettings):
    known = known_policies

    name: str = "cost"


class PredictorSettings(_PlugInSettings):
    """How times are learned; read at the start only."""

    known = known_predictors

    name: str = "linear"

    def make(self) -> MakePredictor:
        return known_predictors()[self.name].build(self.name, self.parameters)


class FilterSettings(_PlugInSettings):
    """A filter in front of the policy."""

    known = known_filters

    legs: Literal["both", "prefill", "decode"] = "both"
    required: bool = Field(default=False, description="A leg nobody would be left for: false, is not filtered")


class SloSettings(_Section):
    """Promised to requests that ask for nothing else; None: nothing."""

    ttft_ms: float | None = Field(default=None, gt=0)
    itl_ms: float | None = Field(default=None, gt=0)

    @property
    def slo(self) -> Slo:
        return Slo(self.ttft_ms, self.itl_ms)


class ScheduleConfig(_Section):
    """What may change while requests are running."""

    policy: PolicySettings = Field(default_factory=PolicySettings)
    filters: tuple[FilterSettings, ...] = ()
    predictor: PredictorSettings = Field(default_factory=PredictorSettings)
    slo: SloSettings = SloSettings()
    flow: FlowSettings = FlowSettings()
    tenants: tuple[TenantSettings, ...] = ()
    health: HealthSettings = Field(default_factory=lambda: HealthSettings.model_validate({}))
    hedging: HedgingSettings = Field(default_factory=lambda: HedgingSettings.model_validate({}))

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [tenant.name for tenant in self.tenants]
        digests = [key.digest for tenant in self.tenants for key in tenant.keys if key.is_set]
        if len(set(names)) < len(names):
            raise ValueError("tenants: two have the same name")
        if len(set(digests)) < len(digests):
            raise ValueError("tenants: a key is given twice")
        return self

    @classmethod
    def load(cls, path: Path, base: Self | None = None, *, keys_elsewhere: bool = False) -> Self:
        """Read and check a file; sections it does not have are those of `base`.

        With `keys_elsewhere` the variables of `key_env` may be missing on this machine.

        Raises:
            InvalidRequest: it cannot be read, or something in it is wrong; the message has a line for each.
        """
        try:
            return cls.parse(path.read_bytes(), base, keys_elsewhere=keys_elsewhere)
        except OSError as error:
            raise InvalidRequest(f"{path}: {error.strerror}", field=str(path)) from None
        except InvalidRequest as error:
            raise InvalidRequest(f"{path}: {error.message}", field=error.field) from None

    @classmethod
    def parse(cls, content: bytes, base: Self | None = None, *, keys_elsewhere: bool = False) -> Self:
        """Raises as `load` does."""
        try:
            values = yaml.load(content, _Loader)
        except yaml.YAMLError as error:
            raise InvalidRequest(f"is not YAML: {error}") from None
        if not isinstance(values, dict | None):
            raise InvalidRequest("must hold a mapping of sections")
        given = cls.of(values or {}, keys_elsewhere=keys_elsewhere)
        if base is None:
            return given
        return base.model_copy(update={name: getattr(given, name) for name in given.model_fields_set})

    @classmethod
    def of(cls, values: Mapping[str, Any], *, keys_elsewhere: bool = False) -> Self:
        """Raises as `load` does."""
        try:
            return cls.model_validate(values, context={KEYS_ELSEWHERE: keys_elsewhere})
        except ValidationError as error:
            lines = [_line(cls, detail) for detail in error.errors(include_url=False, include_input=False)]
            raise InvalidRequest("\n".join(lines), field=lines[0].partition(":")[0]) from None

    def make_policy(self) -> Policy:
        """The policy behind its filters."""
        uses = [FilterUse(filter=f.name, **f.model_dump(exclude={"name"})) for f in self.filters]
        return policy_of(self.policy.name, self.policy.parameters, uses)

    @property
    def effective(self) -> dict[str, Any]:
        """All values, defaults too, for people: keys are hidden, digests cut."""
        values = self.model_dump(mode="json")
        for tenant in values["tenants"]:
            tenant["keys"] = [_redacted(key) for key in tenant["keys"]]
        return values

    @property
    def digest(self) -> str:
        """Equal for equal values."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        secrets = [key.digest.hex() for tenant in self.tenants for key in tenant.keys]
        return hashlib.sha256("\n".join((text, *secrets)).encode()).hexdigest()[:16]


def _redacted(key: Mapping[str, str | None]) -> Mapping[str, str]:
    if (digest := key["sha256"]) is not None:
        return {"sha256": f"{digest[:_SHOWN_DIGITS]}..."}
    return {"key_env": key["key_env"]} if key["key_env"] else {"key": "..."}


def _line(model: type[BaseModel], detail: Mapping[str, Any]) -> str:
    """`flow.ordr: unknown; did you mean 'order'? known: ...`"""
    path: Sequence[str | int] = detail["loc"]
    where = ".".join(str(part) for part in path)
    message: str = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "model_type":
        message = f"must be a mapping of {', '.join(_fields_at(model, path))}"
    elif detail["type"] == "tuple_type":
        message = "must be a list"
    elif detail["type"] == "extra_forbidden":
        try:
            known_name(str(path[-1]), _fields_at(model, path[:-1]))
        except ValueError as error:
            message = str(error)
    return f"{where}: {message}" if where else message


def _fields_at(model: type[BaseModel], path: Sequence[str | int]) -> Sequence[str]:
    """Names of the settings that may stand there."""
    for part in path:
        if isinstance(part, int):
            continue
        model = next(kind for kind in _models_in(model.model_fields[part].annotation))
    return list(model.model_fields)


def _models_in(annotation: Any) -> Sequence[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m omni_proxy.schedule_config FILE")
    try:
        config = ScheduleConfig.load(Path(sys.argv[1]), keys_elsewhere=True)
    except OmniError as error:
        sys.exit(error.message)
    missing = [str(key.key_env) for tenant in config.tenants for key in tenant.keys if not key.is_set]
    for variable in missing:
        print(f"note: {variable} (key_env) is not set here; it must be where the proxy runs", file=sys.stderr)
    # The digest is of the keys too.
    print(json.dumps({"digest": None if missing else config.digest, "effective": config.effective}, indent=2))


if __name__ == "__main__":
    main()
