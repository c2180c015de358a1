"""Traces, logs and metrics, set up once in a service's `app.py`. Nothing happens on import."""

import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from prometheus_client import CollectorRegistry, start_http_server

from omni_common.settings import ServiceSettings

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}
"""Not shown as extra fields; the last is uvicorn's message once more, for terminals."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line; `extra` fields and the current trace ids are keys of it."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            entry |= {"trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"}
        entry |= {k: v for k, v in record.__dict__.items() if k not in _STANDARD and not k.startswith("_")}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class Telemetry:
    """A service's metrics registry, and the tracer provider behind `opentelemetry.trace`."""

    def __init__(self, provider: TracerProvider | None, registry: CollectorRegistry, metrics_port: int | None) -> None:
        self._provider = provider
        self.registry = registry
        self.metrics_port = metrics_port

    def close(self) -> None:
        """Send what is buffered; at most the exporter's own time-out."""
        if self._provider is not None:
            self._provider.shutdown()


def set_up(settings: ServiceSettings, instance: str, version: str) -> Telemetry:
    """Configure logging, and tracing and a metrics endpoint where the settings ask for them."""
    service = f"omni-{settings.service}"
    _set_up_logging(settings, service)
    provider = None
    if settings.otlp_endpoint:
        attributes = {"service.name": service, "service.instance.id": instance, "service.version": version}
        sampler = ParentBased(TraceIdRatioBased(settings.trace_sample_ratio))
        provider = TracerProvider(resource=Resource.create(attributes), sampler=sampler)
        insecure = not settings.otlp_endpoint.startswith("https")
        exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint, insecure=insecure, timeout=5)
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=500))
        trace.set_tracer_provider(provider)
    registry = CollectorRegistry()
    port = None
    if settings.metrics_port is not None:
        port = _serve_metrics(settings.metrics_host, settings.metrics_port, registry)
        logging.getLogger(__name__).info("metrics served", extra={"port": port})
    return Telemetry(provider, registry, port)


def _serve_metrics(host: str, port: int, registry: CollectorRegistry) -> int:
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        raise OSError(f"cannot serve metrics on {host}:{port}: {error.strerror}") from None
    return server.server_port


def _set_up_logging(settings: ServiceSettings, service: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    if settings.log_format == "json":
        handler.setFormatter(JsonFormatter(service))
    else:
        handler.setFormatter(logging.Formatter(f"%(asctime)s {service} %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    threading.excepthook = lambda args: root.error(
        "thread %s died",
        args.thread and args.thread.name,
        exc_info=(args.exc_type, args.exc_value, args.exc_traceback),  # type: ignore[arg-type]
    )


@contextmanager
def span(name: str, traceparent: str = "", **attributes: Any) -> Iterator[trace.Span]:
    """A span under the current one, or under `traceparent` (W3C) where that is given."""
    parent = propagate.extract({"traceparent": traceparent}) if traceparent else None
    with trace.get_tracer("omni").start_as_current_span(name, context=parent, attributes=attributes) as current:
        yield current


def traceparent() -> str:
    """W3C trace context of the current span; empty outside a recorded one."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent", "")
