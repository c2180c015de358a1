"""The error tree. No transport types: gRPC and HTTP mappings live in one module each.

    OmniError
    ├── InvalidRequest        the caller's input; names the field
    ├── Unauthenticated       no or wrong credentials
    ├── NotFound              no such model, worker, lease, layout
    ├── FailedPrecondition    right input, wrong state (draining, wrong model, old epoch)
    ├── ResourceExhausted     a bound is reached; may carry retry_after_s
    ├── Unavailable           a part is away; may carry retry_after_s
    ├── DeadlineExceeded      time ran out
    ├── Cancelled             the caller is gone
    └── Internal              a defect here

Messages never hold prompt or completion text.
"""

from enum import StrEnum
from typing import ClassVar


class Code(StrEnum):
    """Names of google.rpc.Code, the ones in use."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    NOT_FOUND = "NOT_FOUND"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"


class OmniError(Exception):
    """Root of every error Omni raises on purpose.

    `field` names the offending input, `reason` is a stable machine-readable word.
    """

    code: ClassVar[Code] = Code.INTERNAL

    def __init__(
        self, message: str, *, field: str | None = None, reason: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.reason = reason
        self.retry_after_s = retry_after_s


class InvalidRequest(OmniError):
    code = Code.INVALID_ARGUMENT


class Unauthenticated(OmniError):
    code = Code.UNAUTHENTICATED


class NotFound(OmniError):
    code = Code.NOT_FOUND


class FailedPrecondition(OmniError):
    code = Code.FAILED_PRECONDITION


class ResourceExhausted(OmniError):
    code = Code.RESOURCE_EXHAUSTED


class Unavailable(OmniError):
    code = Code.UNAVAILABLE


class DeadlineExceeded(OmniError):
    code = Code.DEADLINE_EXCEEDED


class Cancelled(OmniError):
    code = Code.CANCELLED


class Internal(OmniError):
    code = Code.INTERNAL


_BY_CODE: dict[Code, type[OmniError]] = {
    kind.code: kind
    for kind in (
        InvalidRequest,
        Unauthenticated,
        NotFound,
        FailedPrecondition,
        ResourceExhausted,
        Unavailable,
        DeadlineExceeded,
        Cancelled,
        Internal,
    )
}


def error_of(
    code: str, message: str, *, field: str | None = None, reason: str = "", retry_after_s: float | None = None
) -> OmniError:
    """The error a code name stands for; names not in `Code` become `Internal`."""
    kind = _BY_CODE[Code(code)] if code in Code.__members__ else Internal
    return kind(message, field=field, reason=reason, retry_after_s=retry_after_s)
