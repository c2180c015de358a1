"""The one place where errors become gRPC statuses and back."""

from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from omni_common.errors import OmniError, error_of

_NOT_OPENED = "failed to connect to all addresses"
_ENDED = (
    "it ended the handshake: it may ask for TLS (OMNI_TLS__CA_FILE), or for a client certificate of its authority "
    "(OMNI_TLS__CERT_FILE)"
)
_HANDSHAKES = {
    "WRONG_VERSION_NUMBER": "it answers without TLS, and here OMNI_TLS__CA_FILE is set",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not valid for the authority in OMNI_TLS__CA_FILE",
    "Hostname Verification Check failed": "its certificate (OMNI_TLS__CERT_FILE there) does not name the host asked",
    "Socket closed": _ENDED,
    "Connection reset by peer": _ENDED,
}
"""What gRPC says of a connection that did not come about, and which setting it means."""
_DOMAIN = "omni"
_DETAILS_KEY = "grpc-status-details-bin"


def to_status(error: OmniError) -> status_pb2.Status:
    """google.rpc.Status with ErrorInfo, and BadRequest or RetryInfo where they apply."""
    status = status_pb2.Status(code=grpc.StatusCode[error.code.name].value[0], message=error.message)
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason or error.code.name, domain=_DOMAIN)]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        status.details.append(_packed(detail))
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: OmniError) -> None:
    """End the call with the error's status. Always raises."""
    trailing = ((_DETAILS_KEY, to_status(error).SerializeToString()),)
    await context.abort(grpc.StatusCode[error.code.name], error.message, trailing)


def handshake_failure(error: grpc.aio.AioRpcError) -> str:
    """Why the two sides could not agree on TLS, and which setting is about it; empty where nothing points to that."""
    said = error.details() or ""
    return next((hint for sign, hint in _HANDSHAKES.items() if sign in said), "") if _NOT_OPENED in said else ""


def why(error: grpc.aio.AioRpcError) -> str:
    """What a failed call says, for a reader; with the setting to look at where the connection failed for TLS."""
    hint, said = handshake_failure(error), error.details() or ""
    return f"{hint} ({said})" if hint else said


def log_fields(error: Exception) -> dict[str, str]:
    """What a log line says of a call that failed."""
    if isinstance(error, grpc.aio.AioRpcError):
        return {"code": error.code().name, "detail": why(error)}
    return {"code": type(error).__name__, "detail": ""}


def from_rpc_error(error: grpc.aio.AioRpcError) -> OmniError:
    """The error a failed call stands for, with field and retry delay where the server sent them."""
    field, reason, retry_after_s = None, "", None
    trailing: Any = error.trailing_metadata() or ()
    for key, value in trailing:
        if key != _DETAILS_KEY:
            continue
        for detail in status_pb2.Status.FromString(value).details:
            info, bad, retry = (
                error_details_pb2.ErrorInfo(),
                error_details_pb2.BadRequest(),
                error_details_pb2.RetryInfo(),
            )
            if detail.Unpack(info):
                reason = info.reason
            elif detail.Unpack(bad) and bad.field_violations:
                field = bad.field_violations[0].field
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return error_of(error.code().name, why(error), field=field, reason=reason, retry_after_s=retry_after_s)


def _packed(detail: Any) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed
