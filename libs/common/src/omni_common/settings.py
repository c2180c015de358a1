"""Frozen settings, read once from one YAML file and the environment; unknown names are refused.

Precedence: `OMNI_<SERVICE>_<FIELD>`, then `OMNI_<FIELD>` for the fields every service shares, then the
YAML file named by `OMNI_<SERVICE>_CONFIG`, then defaults. Nested fields join with a double underscore.
"""

import contextlib
import difflib
import os
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FilePath,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from omni_common.errors import InvalidRequest

SERVICES = ("proxy", "prefill", "decode", "kvstore", "placement")


class TlsSettings(BaseModel):
    """Paths of PEM files. With `ca_file` on a server, clients must show a certificate of that authority."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cert_file: FilePath | None = Field(default=None, description="Certificate, PEM; with key_file")
    key_file: FilePath | None = Field(default=None, description="Its private key")
    ca_file: FilePath | None = Field(default=None, description="Authority that the other side's certificate must be of")

    @field_validator("ca_file")
    @classmethod
    def _is_authority(cls, path: Path | None) -> Path | None:
        if path is not None:
            with _told_as(f"{path} holds no certificates in PEM"):
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
        return path

    @model_validator(mode="after")
    def _is_pair(self) -> Self:
        if self.cert_file is None and self.key_file is None:
            return self
        if self.cert_file is None or self.key_file is None:
            raise ValueError("cert_file and key_file need each other")
        with _told_as(f"{self.cert_file} and {self.key_file} are no certificate and its key, unencrypted, in PEM"):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # Without a password OpenSSL would ask the terminal for one.
            context.load_cert_chain(self.cert_file, self.key_file, password=lambda: "")
        return self


class ServiceSettings(BaseModel):
    """Fields every service has. A service derives, sets `service` and adds its own fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    service: ClassVar[str] = ""

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="debug, info, warning, error")
    log_format: Literal["json", "text"] = Field("json", description="json, or text, which reads better on a terminal")
    otlp_endpoint: str | None = Field(None, description="OTLP gRPC endpoint for traces, e.g. http://collector:4317")
    trace_sample_ratio: float = Field(1.0, ge=0, le=1, description="Share of root traces that are recorded")
    metrics_port: int | None = Field(None, ge=0, le=65535, description="Prometheus port; 0 picks a free one")
    metrics_host: str = Field("127.0.0.1", description="Address the metrics are served on")
    drain_timeout_s: float = Field(30.0, ge=0, description="How long SIGTERM waits for running work")
    tls: TlsSettings = TlsSettings()

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Read file and environment.

        Raises:
            InvalidRequest: an unknown variable or key, or a value out of range; the message names it.
        """
        environ = os.environ if environ is None else environ
        values = _merged(_from_file(cls.service, environ), _from_environment(cls, environ))
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            name = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                raise InvalidRequest(f"unknown setting {name!r} of {cls.service}", field=name) from None
            said = first["msg"].removeprefix("Value error, ")
            raise InvalidRequest(
                f"setting {name!r} of {cls.service} ({_variable(cls, first['loc'])}): {said}", field=name
            ) from None


class _CommandSettings(ServiceSettings):
    service = "cli"


def tls_of_command() -> TlsSettings:
    """How a command reaches services: `OMNI_CLI_TLS__*`, or `OMNI_TLS__*` as services have it; raises as `load`."""
    prefixes = ("OMNI_CLI_TLS__", "OMNI_TLS__")
    return _CommandSettings.load({name: raw for name, raw in os.environ.items() if name.startswith(prefixes)}).tls


def part_of(annotation: Any) -> type[BaseModel] | None:
    """The model of a field that has parts."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


@contextlib.contextmanager
def _told_as(message: str) -> Iterator[None]:
    """A file that TLS cannot use is a wrong setting, whatever the reason."""
    try:
        yield
    except OSError as error:  # of which `ssl.SSLError` is one
        said = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        raise ValueError(f"{message}: {said}" if said else message) from None


def _variable(cls: type[ServiceSettings], loc: tuple[int | str, ...]) -> str:
    """The variable that sets a field; `*` where a part of it is wrong together with others."""
    names: list[str] = []
    model: type[BaseModel] | None = cls
    for name in map(str, loc):
        if model is None or name not in model.model_fields:
            break
        names.append(name.upper())
        model = part_of(model.model_fields[name].annotation)
    return f"OMNI_{cls.service.upper()}_{'__'.join(names if model is None else [*names, '*'])}"


def _from_file(service: str, environ: Mapping[str, str]) -> dict[str, Any]:
    variable = f"OMNI_{service.upper()}_CONFIG"
    if not (path := environ.get(variable)):
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InvalidRequest(f"{variable}: cannot read settings: {error}", field=variable) from None
    if not isinstance(content, dict | None):
        raise InvalidRequest(f"{variable}: the file must hold a mapping of settings", field=variable)
    return content or {}


def _from_environment(cls: type[ServiceSettings], environ: Mapping[str, str]) -> dict[str, Any]:
    own_prefix = f"OMNI_{cls.service.upper()}_"
    foreign = tuple(f"OMNI_{name.upper()}_" for name in SERVICES if name != cls.service)
    values: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for variable, raw in environ.items():
        if not variable.startswith("OMNI_") or variable.startswith(foreign) or variable == f"{own_prefix}CONFIG":
            continue
        is_own = variable.startswith(own_prefix)
        path = variable.removeprefix(own_prefix if is_own else "OMNI_").lower().split("__")
        _put(values if is_own else shared, path, raw, variable, cls if is_own else ServiceSettings, cls)
    return _merged(shared, values)


def _put(
    target: dict[str, Any], path: list[str], raw: str, variable: str, model: type[BaseModel], top: type[ServiceSettings]
) -> None:
    field = model.model_fields.get(path[0])
    if field is None:
        known = [variable[: -len("__".join(path))] + name.upper() for name in model.model_fields]
        if model in (top, ServiceSettings):
            known += [f"OMNI_{top.service.upper()}_{name.upper()}" for name in top.model_fields]
            known += [f"OMNI_{name.upper()}" for name in ServiceSettings.model_fields]
        close = difflib.get_close_matches(variable, known, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InvalidRequest(f"unknown setting {variable}{hint}", field=variable)
    if len(path) == 1:
        target[path[0]] = _parsed(raw, field.annotation)
        return
    if (part := part_of(field.annotation)) is not None:
        _put(target.setdefault(path[0], {}), path[1:], raw, variable, part, top)
        return
    raise InvalidRequest(f"setting {variable}: {path[0]!r} has no parts", field=variable)


def _parsed(raw: str, annotation: Any) -> Any:
    """Text stays text where the field takes text; lists and mappings are read as YAML."""
    try:
        TypeAdapter(annotation).validate_python(raw)
    except ValidationError:
        try:
            return yaml.safe_load(raw)
        except yaml.YAMLError:
            return raw
    return raw


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result
