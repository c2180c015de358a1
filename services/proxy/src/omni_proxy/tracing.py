"""Spans of one request. Attributes are numbers, ids and reasons; never text or tokens."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer

Attribute = str | int | float | bool


class RequestTrace:
    """The root span of a request and the children of its legs."""

    def __init__(self, tracer: Tracer, headers: Mapping[str, str]) -> None:
        self._tracer = tracer
        self._span = tracer.start_span("proxy.request", context=propagate.extract(headers), kind=SpanKind.SERVER)
        self._context = trace.set_span_in_context(self._span)

    @contextmanager
    def leg(self, name: str, make_attributes: Callable[[], Mapping[str, Attribute]]) -> "Iterator[Leg]":
        """A child span; an error that leaves the block marks it. Where the request is not traced it has no span."""
        if not self._span.is_recording():
            yield Leg(self._span, self._context)
            return
        attributes = dict(make_attributes())
        span = self._tracer.start_span(name, context=self._context, kind=SpanKind.CLIENT, attributes=attributes)
        try:
            yield Leg(span, trace.set_span_in_context(span))
        except Exception as error:
            span.set_status(StatusCode.ERROR, type(error).__name__)
            raise
        finally:
            span.end()

    def event(self, name: str, make_attributes: Callable[[], Mapping[str, Attribute]]) -> None:
        """Something that happened just now; attributes are made only where the request is traced."""
        if self._span.is_recording():
            self._span.add_event(name, dict(make_attributes()))

    @property
    def exemplar(self) -> dict[str, str] | None:
        """Labels that lead from a histogram's bucket to this trace; None where it is not kept."""
        context = self._span.get_span_context()
        return {"trace_id": trace.format_trace_id(context.trace_id)} if context.trace_flags.sampled else None

    def end(self, make_attributes: Callable[[], Mapping[str, Attribute]], error: str | None) -> None:
        if self._span.is_recording():
            self._span.set_attributes(dict(make_attributes()))
        if error is not None:
            self._span.set_status(StatusCode.ERROR, error)
        self._span.end()


class Leg:
    """A running child span, or that of the request where nothing is recorded."""

    def __init__(self, span: Span, context: Context) -> None:
        self._span = span
        self._context = context

    @property
    def headers(self) -> dict[str, str]:
        """W3C headers that make a callee's span a child of this one."""
        carrier: dict[str, str] = {}
        propagate.inject(carrier, self._context)
        return carrier

    def set(self, attributes: Mapping[str, Attribute]) -> None:
        self._span.set_attributes(dict(attributes))
