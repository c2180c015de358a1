"""gRPC servers and channels as every service builds them.

Servers: errors mapped by one interceptor, W3C trace context taken from metadata, health and reflection,
message limits, keepalive, optional mutual TLS, graceful drain. Channels: keepalive, limits, and retries only
for the methods named idempotent.
"""

import asyncio
import contextlib
import json
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from opentelemetry import propagate, trace

from omni_common.errors import DeadlineExceeded, Internal, InvalidRequest, OmniError
from omni_common.rpc_errors import abort
from omni_common.settings import TlsSettings

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 32 * 1024 * 1024
DEFAULT_DEADLINE_S = 600.0
_LIMITS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_SERVER_ONLY = [("grpc.http2.min_ping_interval_without_data_ms", 5_000), ("grpc.so_reuseport", 0)]


@dataclass(frozen=True, slots=True)
class Servicer:
    """One service of a server: its implementation, how grpcio adds it, and its full name."""

    implementation: Any
    add: Callable[[Any, Any], None]
    name: str


class _ErrorsAndTraces(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Turns `OmniError` into a status, bounds unary calls, and continues the caller's trace."""

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(details)
        if handler is None or details.method.startswith(("/grpc.health", "/grpc.reflection")):
            return handler
        parent = propagate.extract({k: v for k, v in details.invocation_metadata or () if isinstance(v, str)})
        name, parse = details.method.lstrip("/"), _parser(handler.request_deserializer)
        if handler.request_streaming or handler.response_streaming:
            return _streaming(handler, name, parse)
        return grpc.unary_unary_rpc_method_handler(
            _unary(handler.unary_unary, name, parent), parse, handler.response_serializer
        )


def _parser(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """What cannot be parsed becomes an error in the message's place, for the call to raise: raised here, gRPC would
    answer UNKNOWN and log a traceback."""

    def parsed(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return InvalidRequest("the request is not a message of this contract", reason="unreadable")

    return parsed


def _readable(request: Any) -> Any:
    if isinstance(request, InvalidRequest):
        raise request
    return request


async def _all_readable(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _readable(request)


def _unary(call: Any, name: str, parent: Any) -> Any:
    tracer = trace.get_tracer("omni.rpc")

    async def bounded(request: Any, context: Any) -> Any:
        remaining = context.time_remaining()
        limit_s = DEFAULT_DEADLINE_S if remaining is None else remaining
        with tracer.start_as_current_span(name, context=parent, kind=trace.SpanKind.SERVER) as span:
            try:
                async with asyncio.timeout(limit_s):
                    return await call(_readable(request), context)
            except TimeoutError:
                await abort(context, DeadlineExceeded(f"{name}: no answer within {limit_s:.3f} s"))
            except OmniError as error:
                span.set_status(trace.StatusCode.ERROR, error.code)
                await abort(context, error)
            except Exception as error:
                await _abort_internal(context, name, error)

    return bounded


def _streaming(handler: Any, name: str, parse: Callable[[bytes], Any]) -> Any:
    """Streaming calls live long, so they are bounded by keepalive and carry no span of their own."""
    if handler.response_streaming:
        make = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
        readable = _all_readable if handler.request_streaming else _readable

        async def responses(request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                async for response in inner(readable(request), context):
                    yield response
            except OmniError as error:
                await abort(context, error)
            except Exception as error:
                await _abort_internal(context, name, error)

        return make(responses, parse, handler.response_serializer)

    async def response(requests: Any, context: Any) -> Any:
        try:
            return await handler.stream_unary(_all_readable(requests), context)
        except OmniError as error:
            await abort(context, error)
        except Exception as error:
            await _abort_internal(context, name, error)

    return grpc.stream_unary_rpc_method_handler(response, parse, handler.response_serializer)


async def _abort_internal(context: Any, name: str, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    log.exception("unexpected error in %s", name)
    await abort(context, Internal(f"{name} failed: {type(error).__name__}", reason="unexpected"))


class Server:
    """A running gRPC server. Use `start`, then `wait_for_termination` or `stop`."""

    def __init__(self, servicers: Sequence[Servicer], tls: TlsSettings | None = None) -> None:
        self._server = grpc.aio.server(interceptors=[_ErrorsAndTraces()], options=[*_LIMITS, *_SERVER_ONLY])
        self._tls = tls or TlsSettings()
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for servicer in servicers:
            servicer.add(servicer.implementation, self._server)
        self._names = [s.name for s in servicers]
        names = (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.port = 0

    async def start(self, address: str, *, serving: bool = True) -> int:
        """Bind `host:port` (port 0 picks a free one) and accept calls; returns the port.

        With `serving` False health answers NOT_SERVING until `set_serving(True)`.
        """
        credentials = _server_credentials(self._tls)
        try:
            if credentials is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError:  # says to set GRPC_VERBOSITY; the reason is on stderr
            raise OSError(f"cannot listen on {address}: is the port in use, or the host not this machine's?") from None
        await self.set_serving(serving)
        await self._server.start()
        return self.port

    async def set_serving(self, serving: bool) -> None:
        """What the health service answers, for the server and for each of its services."""
        statuses = health_pb2.HealthCheckResponse
        status = statuses.SERVING if serving else statuses.NOT_SERVING
        for name in ("", *self._names):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Report NOT_SERVING, refuse new calls, give running ones `grace_s`."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


async def run_until_signal(server: Server, drain: Callable[[], Awaitable[None]], drain_timeout_s: float) -> None:
    """Serve until SIGTERM or SIGINT, then drain within the time given and stop. A second signal stops at once."""
    stop, now = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        (now if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    await stop.wait()
    log.info("draining", extra={"timeout_s": drain_timeout_s})
    await server.set_serving(False)
    draining = asyncio.ensure_future(drain())
    hurried = asyncio.ensure_future(now.wait())
    await asyncio.wait({draining, hurried}, timeout=drain_timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for task in (draining, hurried):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await server.stop(grace_s=1.0)


def channel(address: str, *, tls: TlsSettings | None = None, idempotent: Sequence[str] = ()) -> grpc.aio.Channel:
    """A channel to `host:port`. `idempotent` lists full method names (`package.Service/Method`) that are
    retried on UNAVAILABLE, three attempts with backoff from 50 ms; nothing else is ever retried."""
    names = [dict(zip(("service", "method"), name.split("/"), strict=True)) for name in idempotent]
    policy = {
        "maxAttempts": 3,
        "initialBackoff": "0.05s",
        "maxBackoff": "1s",
        "backoffMultiplier": 3,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    config = {"methodConfig": [{"name": names, "retryPolicy": policy}]} if names else {}
    options = [
        *_LIMITS,
        ("grpc.service_config", json.dumps(config)),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 2_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    credentials = _channel_credentials(tls or TlsSettings())
    if credentials:
        return grpc.aio.secure_channel(address, credentials, options)
    return grpc.aio.insecure_channel(address, options)


def trace_metadata() -> list[tuple[str, str]]:
    """W3C headers of the current span, as call metadata."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return list(carrier.items())


def _server_credentials(tls: TlsSettings) -> grpc.ServerCredentials | None:
    if not (tls.cert_file and tls.key_file):
        return None
    ca = tls.ca_file.read_bytes() if tls.ca_file else None
    pair = (tls.key_file.read_bytes(), tls.cert_file.read_bytes())
    return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)


def _channel_credentials(tls: TlsSettings) -> grpc.ChannelCredentials | None:
    if not tls.ca_file:
        return None
    key = tls.key_file.read_bytes() if tls.key_file else None
    cert = tls.cert_file.read_bytes() if tls.cert_file else None
    return grpc.ssl_channel_credentials(tls.ca_file.read_bytes(), key, cert)
