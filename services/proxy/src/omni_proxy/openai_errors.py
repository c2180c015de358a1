"""The one place where errors become HTTP answers."""

import math
from typing import Any

import orjson

from omni_common.errors import Code, OmniError

_STATUS = {
    Code.INVALID_ARGUMENT: (400, "invalid_request_error"),
    Code.UNAUTHENTICATED: (401, "authentication_error"),
    Code.NOT_FOUND: (404, "not_found"),
    Code.FAILED_PRECONDITION: (503, "server_error"),
    Code.RESOURCE_EXHAUSTED: (429, "rate_limit_error"),
    Code.UNAVAILABLE: (503, "server_error"),
    Code.DEADLINE_EXCEEDED: (504, "timeout_error"),
    Code.CANCELLED: (499, "cancelled"),
    Code.INTERNAL: (500, "server_error"),
}
_BY_REASON = {
    "body_too_large": 413,
    "body_timeout": 408,
    "unsupported_encoding": 415,
    "method_not_allowed": 405,
    "rejected": 502,
    "engine_error": 502,
    "session_broken": 502,
    "attempts_exhausted": 502,
}
"""Statuses finer than the code; legs that broke are 502, parts that are away 503."""


def status_of(error: OmniError) -> int:
    status, _ = _STATUS[error.code]
    finer = _BY_REASON.get(error.reason, status)
    # What a worker refuses for the caller's sake keeps its own status.
    return status if finer == 502 and status in (400, 404, 429, 504) else finer


def error_body(error: OmniError) -> dict[str, Any]:
    _, kind = _STATUS[error.code]
    body = {"message": error.message, "type": kind, "param": error.field, "code": (error.reason or error.code).lower()}
    return {"error": body}


def error_event(error: OmniError) -> bytes:
    """A server-sent event: the stream ends in an error, not in silence."""
    return b"data: " + orjson.dumps(error_body(error)) + b"\n\n"


def error_headers(error: OmniError) -> dict[str, str]:
    """Of an answer that is an error; `x-omni-dropped-reason` says why a request found no place."""
    headers = {"content-type": "application/json"}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if status_of(error) in (429, 503) and error.reason:
        headers["x-omni-dropped-reason"] = error.reason
    if error.code is Code.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    if error.reason in ("body_too_large", "body_timeout"):
        headers["connection"] = "close"
    return headers
