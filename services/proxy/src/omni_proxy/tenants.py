"""Who asks: API keys, tenants, and what a request's headers promise or demand."""

import hashlib
import hmac
import math
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator, model_validator

from omni_common.errors import InvalidRequest, OmniError, ResourceExhausted, Unauthenticated
from omni_proxy.flow.metrics import FlowMetrics
from omni_proxy.quotas import Quota
from omni_proxy.scheduling.request import Caller, Slo

ANY = "*"
"""The tenant whose limits hold, each for itself, for names that are not configured."""
_NAME = re.compile(r"[A-Za-z0-9_.:@-]{1,64}")
_NAME_RULE = "1 to 64 letters, digits or any of _.:@-"
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_SESSION = re.compile(r"[\x21-\x7e]{1,128}")
KEYS_ELSEWHERE = "keys_elsewhere"
"""In a validation's context: variables of keys may be missing, as the proxy runs on another machine."""
_MAX_PRIORITY = 100
_MAX_SLO_MS = 3_600_000.0
_MAX_UNKNOWN = 1024
"""Tenants that are not configured whose use is remembered, and any with requests in flight."""
_FORGOTTEN_AT_ONCE = 4

TENANT = ("x-omni-tenant", "x-llm-d-inference-fairness-id")
TTFT_SLO = ("x-omni-ttft-slo-ms", "x-llm-d-slo-ttft-ms")
ITL_SLO = ("x-omni-itl-slo-ms", "x-llm-d-slo-tpot-ms")
PRIORITY, SESSION = "x-omni-priority", "x-omni-session"


class ApiKey(BaseModel):
    """One key, in one of three ways. Only its digest is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str | None = Field(default=None, description="Hex digest of the key")
    key_env: str | None = Field(default=None, min_length=1, description="Name of an environment variable")
    key: SecretStr | None = Field(default=None, min_length=1)

    @field_validator("sha256")
    @classmethod
    def _is_digest(cls, given: str | None) -> str | None:
        if given is not None and not _DIGEST.fullmatch(given):
            raise ValueError("must be 64 hexadecimal digits")
        return given

    @model_validator(mode="after")
    def _one_way(self, info: ValidationInfo) -> Self:
        if sum(way is not None for way in (self.sha256, self.key_env, self.key)) != 1:
            raise ValueError("give one of sha256, key_env and key")
        if not self.is_set and not (info.context or {}).get(KEYS_ELSEWHERE):
            raise ValueError(f"the environment variable {self.key_env} is not set")
        if self._plain != self._plain.strip():
            where = "the key" if self.key_env is None else f"the environment variable {self.key_env}"
            raise ValueError(f"{where} begins or ends with white space, which no header can bring")
        return self

    @property
    def is_set(self) -> bool:
        """False: its variable is missing here."""
        return self.key_env is None or bool(os.environ.get(self.key_env))

    @property
    def digest(self) -> bytes:
        if self.sha256 is not None:
            return bytes.fromhex(self.sha256)
        return hashlib.sha256(self._plain.encode()).digest()

    @property
    def _plain(self) -> str:
        return os.environ.get(self.key_env or "", "") if self.key is None else self.key.get_secret_value()


class TenantSettings(BaseModel):
    """One tenant. Limits that are None do not hold."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    keys: tuple[ApiKey, ...] = ()
    weight: float = Field(default=1.0, gt=0, le=1e6, description="Share among the tenants of a band")
    priority: int = Field(default=0, ge=-_MAX_PRIORITY, le=_MAX_PRIORITY, description="Where a request says none")
    max_priority: int | None = Field(
        default=None, ge=-_MAX_PRIORITY, le=_MAX_PRIORITY, description="Most a request may ask for; None: `priority`"
    )
    requests_per_minute: float | None = Field(default=None, gt=0)
    tokens_per_minute: float | None = Field(default=None, gt=0)
    tokens_per_day: float | None = Field(default=None, gt=0)
    max_inflight: int | None = Field(default=None, ge=1)

    @field_validator("name")
    @classmethod
    def _can_be_named(cls, name: str) -> str:
        if name != ANY and not _NAME.fullmatch(name):
            raise ValueError(f"must be {_NAME_RULE}, or {ANY!r}")
        return name

    @property
    def priority_limit(self) -> int:
        return self.priority if self.max_priority is None else max(self.priority, self.max_priority)


_UNCONFIGURED = TenantSettings(name=ANY, max_priority=_MAX_PRIORITY)


@dataclass(slots=True)
class _Tenant:
    settings: TenantSettings
    quota: Quota


class Visit:
    """One request's stay: counted in until `end`, its tokens charged and then settled."""

    def __init__(self, tenants: "Tenants", tenant: _Tenant, caller: Caller) -> None:
        self.caller = caller
        self._tenants = tenants
        self._tenant = tenant
        self._charged = 0.0
        self._charged_s = 0.0
        self._has_ended = False

    def charge(self, tokens: int) -> None:
        """Raises `ResourceExhausted` when the expected tokens of prompt and output are too many."""
        wall_s = self._tenants.wall()
        with self._tenants.refusals(self._tenant):
            self._tenant.quota.charge(tokens, self._tenants.now(), wall_s)
        self._charged, self._charged_s = tokens, wall_s

    def end(self, tokens: int = 0) -> None:
        """The request is over and has used these tokens; again is nothing."""
        if self._has_ended:
            return
        self._has_ended = True
        quota = self._tenant.quota
        quota.leave()
        quota.settle(tokens - self._charged, self._tenants.now(), self._charged_s)

    @property
    def headers(self) -> Mapping[str, str]:
        return self._tenant.quota.headers(self._tenants.now())


class Tenants:
    """Knows the keys, and what every tenant has used. `now` is monotonic, `wall` Unix time, both in seconds."""

    def __init__(
        self,
        settings: Sequence[TenantSettings],
        slo: Slo,
        metrics: FlowMetrics,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.now = now
        self.wall = wall
        self._metrics = metrics
        self._unknown: OrderedDict[str, _Tenant] = OrderedDict()
        self._tenants: dict[str, _Tenant] = {}
        self.reconfigure(settings, slo)

    def reconfigure(self, settings: Sequence[TenantSettings], slo: Slo) -> None:
        """Go on with other tenants; who stays keeps what it has used."""
        before, now = self._tenants, self.now()
        self._slo = slo
        self._any = next((s for s in settings if s.name == ANY), _UNCONFIGURED)
        self._tenants = {}
        self._digests = [(key.digest, s.name) for s in settings for key in s.keys]
        for each in settings:
            if (known := before.pop(each.name, None) or self._unknown.pop(each.name, None)) is not None:
                known.settings = each
                known.quota.reconfigure(each, now)
            self._tenants[each.name] = known or _Tenant(each, Quota(each, now))
        before.pop(ANY, None)
        self._unknown.update(before)
        for other in self._unknown.values():
            other.settings = self._any
            other.quota.reconfigure(self._any, now)

    @property
    def remembered(self) -> int:
        """Tenants that are not configured and have left a trace."""
        return len(self._unknown)

    def caller_of(self, headers: Mapping[str, str]) -> Caller:
        """Who asks and how. Names in a header count only while no keys are configured.

        Raises:
            Unauthenticated: no key, or one that is not known.
            InvalidRequest: a header is malformed or asks for too high a priority; it names the header.
        """
        name = self._authenticated(headers) if self._digests else self._named(headers)
        settings = self._settings_of(name)
        return Caller(
            tenant=name,
            priority=_priority(headers, settings),
            weight=settings.weight,
            slo=Slo(
                _milliseconds(headers, TTFT_SLO, self._slo.ttft_ms), _milliseconds(headers, ITL_SLO, self._slo.itl_ms)
            ),
            session=_matching(headers, (SESSION,), _SESSION, "1 to 128 printable ASCII characters"),
        )

    def enter(self, caller: Caller) -> Visit:
        """Count a request in.

        Raises:
            ResourceExhausted: above the tenant's rate or its requests in flight.
        """
        tenant = self._tenants.get(caller.tenant) or self._unknown_tenant(caller.tenant)
        with self.refusals(tenant):
            tenant.quota.enter(self.now())
        return Visit(self, tenant, caller)

    def rate_headers(self, caller: Caller) -> Mapping[str, str]:
        tenant = self._tenants.get(caller.tenant) or self._unknown.get(caller.tenant)
        return {} if tenant is None else tenant.quota.headers(self.now())

    @contextmanager
    def refusals(self, tenant: _Tenant) -> Iterator[None]:
        """Counts what the block refuses."""
        try:
            yield
        except ResourceExhausted as error:
            self._metrics.refusals.labels(_label(tenant), error.reason).inc()
            self._metrics.dropped.labels(error.reason).inc()
            raise

    def _authenticated(self, headers: Mapping[str, str]) -> str:
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        if not given:
            raise Unauthenticated("give an API key: Authorization: Bearer KEY", reason="missing_api_key")
        digest = hashlib.sha256(given.encode()).digest()
        found = ""
        # Every digest is compared, whole: neither the time nor the order of keys tells anything about them.
        for known, name in self._digests:
            found = name if hmac.compare_digest(digest, known) else found
        if not found:
            raise Unauthenticated("this API key is not known here", reason="invalid_api_key")
        return found

    def _named(self, headers: Mapping[str, str]) -> str:
        return _matching(headers, TENANT, _NAME, _NAME_RULE)

    def _settings_of(self, name: str) -> TenantSettings:
        tenant = self._tenants.get(name)
        return self._any if tenant is None else tenant.settings

    def _unknown_tenant(self, name: str) -> _Tenant:
        tenant = self._unknown.get(name)
        if tenant is None:
            tenant = self._unknown[name] = _Tenant(self._any, Quota(self._any, self.now()))
        self._unknown.move_to_end(name)
        for _ in range(_FORGOTTEN_AT_ONCE):
            if len(self._unknown) <= _MAX_UNKNOWN:
                break
            oldest, gone = self._unknown.popitem(last=False)
            if gone.quota.inflight:
                self._unknown[oldest] = gone
        return tenant


def _label(tenant: _Tenant) -> str:
    """Names of clients' making share one, so that they make no series."""
    return "other" if tenant.settings.name == ANY else tenant.settings.name


def _given(headers: Mapping[str, str], names: Sequence[str]) -> tuple[str, str] | None:
    return next(((name, headers[name]) for name in names if name in headers), None)


def _matching(headers: Mapping[str, str], names: Sequence[str], pattern: re.Pattern[str], what: str) -> str:
    if (given := _given(headers, names)) is None:
        return ""
    if not pattern.fullmatch(given[1]):
        raise _malformed(given[0], f"must be {what}")
    return given[1]


def _milliseconds(headers: Mapping[str, str], names: Sequence[str], default: float | None) -> float | None:
    if (given := _given(headers, names)) is None:
        return default
    try:
        value = float(given[1])
    except ValueError:
        value = math.nan
    if not 0 < value <= _MAX_SLO_MS:
        raise _malformed(given[0], f"must be milliseconds above 0 and up to {_MAX_SLO_MS:g}")
    return value


def _priority(headers: Mapping[str, str], settings: TenantSettings) -> int:
    text = headers.get(PRIORITY)
    if text is None:
        return settings.priority
    if not re.fullmatch(r"[+-]?[0-9]{1,3}", text) or abs(int(text)) > _MAX_PRIORITY:
        raise _malformed(PRIORITY, f"must be a whole number from -{_MAX_PRIORITY} to {_MAX_PRIORITY}")
    if int(text) > settings.priority_limit:
        raise _malformed(PRIORITY, f"may be at most {settings.priority_limit} for this tenant")
    return int(text)


def _malformed(header: str, why: str) -> OmniError:
    return InvalidRequest(f"header {header}: {why}", field=header, reason="invalid_header")
