"""Servers and channels over a real socket, through the worker contract."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from omni.decode.v1 import decode_service_pb2 as decode_wire
from omni.decode.v1 import decode_service_pb2_grpc as decode_stubs
from omni.engine.v1 import worker_service_pb2 as wire
from omni.engine.v1 import worker_service_pb2_grpc as stubs
from omni_common import errors
from omni_common.errors import OmniError
from omni_common.rpc import Server, Servicer
from omni_common.rpc_errors import from_rpc_error
from omni_common.telemetry import JsonFormatter
from omni_common.testing import serve

NAME = "omni.engine.v1.WorkerService"
DECODE = "omni.decode.v1.DecodeService"


class Worker(stubs.WorkerServiceServicer):
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.cancelled = asyncio.Event()

    async def Describe(self, request: Any, context: Any) -> wire.DescribeResponse:
        if self.error:
            raise self.error
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return wire.DescribeResponse()

    async def WatchStats(self, request: Any, context: Any) -> AsyncIterator[wire.WatchStatsResponse]:
        yield wire.WatchStatsResponse(running=1)
        if self.error:
            raise self.error

    async def Drain(self, request: Any, context: Any) -> wire.DrainResponse:
        return wire.DrainResponse(drained=True)


class Hearing(decode_stubs.DecodeServiceServicer):
    """Counts the messages of a session."""

    def __init__(self) -> None:
        self.count = 0

    async def Session(self, requests: Any, context: Any) -> AsyncIterator[decode_wire.SessionResponse]:
        async for _ in requests:
            self.count += 1
        yield decode_wire.SessionResponse()


def servicer(worker: Worker) -> Servicer:
    return Servicer(worker, stubs.add_WorkerServiceServicer_to_server, NAME)


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(errors.InvalidRequest("max_tokens must be at least 1", field="max_tokens"), id="with field"),
        pytest.param(
            errors.ResourceExhausted("queue is full", reason="queue_full", retry_after_s=1.5), id="with retry"
        ),
        pytest.param(errors.NotFound("no such model"), id="plain"),
        pytest.param(errors.Unavailable("the engine is dead", reason="engine_dead"), id="with reason"),
    ],
)
async def test_errors_cross_the_wire_whole(error: OmniError) -> None:
    async with serve([servicer(Worker(error))]) as channel:
        stub = stubs.WorkerServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as unary:
            await stub.Describe(wire.DescribeRequest(), timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as stream:
            [m async for m in stub.WatchStats(wire.WatchStatsRequest(), timeout=5)]
    for seen in (from_rpc_error(unary.value), from_rpc_error(stream.value)):
        assert type(seen) is type(error)
        assert (seen.message, seen.field, seen.retry_after_s) == (error.message, error.field, error.retry_after_s)
        assert seen.reason == (error.reason or error.code)


async def test_unexpected_errors_do_not_leak_their_text(caplog: pytest.LogCaptureFixture) -> None:
    async with serve([servicer(Worker(ValueError("secret prompt")))]) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stubs.WorkerServiceStub(channel).Describe(wire.DescribeRequest(), timeout=5)
    assert failed.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (failed.value.details() or "")


@pytest.mark.parametrize(
    ("method", "data"),
    [("Describe", b"\xff\xff"), ("WatchStats", b"\xff\xff"), ("WatchStats", b"\x12\x02\xc3\x28")],
    ids=["no message", "no message, streamed answer", "no text where text belongs"],
)
async def test_what_is_no_message_is_the_callers_fault(method: str, data: bytes, caplog: Any) -> None:
    async with serve([servicer(Worker())]) as channel:
        make = channel.unary_unary if method == "Describe" else channel.unary_stream
        call: Any = make(f"/{NAME}/{method}")(data, timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await (call if method == "Describe" else call.read())
        error = from_rpc_error(refused.value)
        assert (error.code, error.reason) == (errors.Code.INVALID_ARGUMENT, "unreadable")
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_what_is_no_message_ends_a_stream_of_them(caplog: Any) -> None:
    hears = Hearing()
    async with serve([Servicer(hears, decode_stubs.add_DecodeServiceServicer_to_server, DECODE)]) as channel:
        call: Any = channel.stream_stream(f"/{DECODE}/Session")(timeout=5)
        await call.write(b"")
        await call.write(b"\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert from_rpc_error(refused.value).reason == "unreadable"
        assert hears.count == 1
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_deadline_cancels_the_handler() -> None:
    worker = Worker()
    async with serve([servicer(worker)]) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await stubs.WorkerServiceStub(channel).Describe(wire.DescribeRequest(), timeout=0.05)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(worker.cancelled.wait(), 5)


async def test_health_and_reflection_answer_on_every_server() -> None:
    async with serve([servicer(Worker())]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", NAME):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = reflect.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5)
        listed = {s.name async for m in call for s in m.list_services_response.service}
    assert {NAME, "grpc.health.v1.Health"} <= listed


async def test_a_taken_port_is_a_clear_error() -> None:
    first, second = Server([]), Server([])
    port = await first.start("127.0.0.1:0")
    try:
        with pytest.raises(OSError, match=f"127.0.0.1:{port}"):
            await second.start(f"127.0.0.1:{port}")
    finally:
        await first.stop(0)


def test_log_lines_are_json_and_carry_the_trace() -> None:
    record = logging.makeLogRecord({"msg": "served", "levelname": "INFO", "name": "x", "port": 7})
    with TracerProvider().get_tracer("t").start_as_current_span("s") as span:
        line = json.loads(JsonFormatter("omni-proxy").format(record))
    assert line["message"] == "served"
    assert line["port"] == 7
    assert line["trace_id"] == trace.format_trace_id(span.get_span_context().trace_id)
