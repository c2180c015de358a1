import asyncio
import itertools
import sys
from pathlib import Path

import grpc
import pytest
from opentelemetry import trace
from prometheus_client import CollectorRegistry

sys.path.insert(0, str(Path(__file__).parent))

from decode_client import PROMPT, session

from omni.decode.v1 import decode_service_pb2 as wire
from omni.decode.v1.decode_service_pb2_grpc import DecodeServiceStub
from omni.engine.v1 import engine_pb2
from omni.prefill.v1.prefill_service_pb2 import PrefillRequest
from omni_common.rpc_errors import from_rpc_error
from omni_common.telemetry import traceparent
from omni_engine.hosting import session as hosting_session
from omni_engine.hosting.background import Background
from omni_engine.hosting.metrics import WorkerMetrics
from omni_engine.hosting.session import DecodeHost, Session, SessionLimits


async def test_sequences_share_frames(hosted):
    async with hosted() as worker, session(worker) as client:
        for stream_id in range(1, 9):
            await client.submit(stream_id, max_tokens=20, token_ids=[stream_id, *PROMPT])
        await client.until_finished(*range(1, 9))
        assert all(len(client.tokens[i]) == 20 for i in range(1, 9))
        assert [f.frame for f in client.frames] == list(range(1, len(client.frames) + 1))
        assert len(client.frames) < 8 * 20 / 2
        assert any(len(f.stream_ids) == 8 and not f.counts for f in client.frames)
        assert {f.reason for f in client.finishes.values()} == {engine_pb2.FINISH_REASON_LENGTH}
        assert set(client.starts) == set(range(1, 9))
        await worker.idle()


async def test_prefill_and_decode_equal_one_engine(hosted):
    async with hosted(role="prefill") as prefill, hosted(role="decode") as decode, session(decode) as client:
        await client.submit(1, max_tokens=12, cache_salt="elsewhere")
        sampling = engine_pb2.Sampling(max_tokens=12, ignore_eos=True)
        request = PrefillRequest(request_id="p", model="sim", token_ids=PROMPT, sampling=sampling)
        first = await prefill.prefill.Prefill(request, timeout=5)
        await client.submit(
            2,
            max_tokens=11,
            token_ids=[*PROMPT, first.first_token_id],
            num_output_tokens=1,
            kv_handle=first.kv_handle,
        )
        await client.until_finished(1, 2)
        assert [first.first_token_id, *client.tokens[2]] == client.tokens[1]
        assert client.starts[2].pulled_tokens == len(PROMPT)
        assert not client.starts[2].fell_back
        assert client.starts[2].timings.transfer_ms > 0
        await prefill.idle()


async def test_failed_pull_is_told(hosted):
    async with hosted() as prefill, hosted(sim={"faults": {"fail_pulls": 1.0}}) as decode, session(decode) as client:
        sampling = engine_pb2.Sampling(max_tokens=3, ignore_eos=True)
        request = PrefillRequest(request_id="p", model="sim", token_ids=PROMPT, sampling=sampling)
        first = await prefill.prefill.Prefill(request, timeout=5)
        await client.submit(1, kv_handle=first.kv_handle)
        await client.until_finished(1)
        assert client.starts[1].fell_back
        assert len(client.tokens[1]) == 8
        assert decode.registry.get_sample_value("omni_worker_fallbacks_total") == 1


@pytest.mark.parametrize("stream_ids", [[1, 77], [1, 1]], ids=["one is not there", "named twice"])
async def test_abort_frees_and_silences(hosted, stream_ids):
    async with hosted() as worker, session(worker) as client:
        await client.submit(1, max_tokens=5000)
        await client.read()
        await client.send(abort=wire.Abort(stream_ids=stream_ids))
        await worker.idle()
        await client.submit(2, max_tokens=3)
        await client.until_finished(2)
        assert 1 not in client.finishes


async def test_what_breaks_the_engine_at_one_sequence_leaves_the_others(hosted, monkeypatch):
    async with hosted() as worker, session(worker) as client:
        await client.submit(1, max_tokens=100)
        await client.read()
        take = worker.engine.submit

        async def submit(job, sink):
            if job.cache_salt == "poison":
                raise ValueError("opaque")
            await take(job, sink)

        monkeypatch.setattr(worker.engine, "submit", submit)
        await client.submit(2, cache_salt="poison")
        await client.submit(3, max_tokens=3)
        await client.until_finished(1, 2, 3)
        # Not rejected: the engine may have taken it, and its blocks are for no other worker then.
        end = client.finishes[2]
        assert (end.reason, end.detail) == (engine_pb2.FINISH_REASON_ERROR, "engine_failed")
        assert len(client.tokens[1]) == 100
        await worker.idle()


@pytest.mark.parametrize("how", ["cancelled", "half-closed"])
async def test_end_of_stream_aborts_everything(hosted, how):
    async with hosted() as worker, session(worker) as client:
        for stream_id in range(1, 6):
            await client.submit(stream_id, max_tokens=5000)
        await client.read()
        assert worker.host.admission.active == 5
        if how == "cancelled":
            client.call.cancel()
        else:
            await client.call.done_writing()
        await worker.idle()
        assert worker.registry.get_sample_value("omni_worker_aborts_total", {"cause": "session_ended"}) == 5


async def test_cancelled_while_the_client_does_not_read(hosted, until):
    async with hosted(frame_window=2) as worker, session(worker) as client:
        await client.submit(1, max_tokens=5000)
        await until(lambda: worker.engine.stats().generated_tokens >= 20)
        client.call.cancel()
        await worker.idle()


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        pytest.param({"model": "other"}, "FAILED_PRECONDITION", id="wrong model"),
        pytest.param({"token_ids": []}, "INVALID_ARGUMENT", id="no tokens"),
        pytest.param({"token_ids": [1, 2], "num_output_tokens": 2}, "INVALID_ARGUMENT", id="no prompt"),
        pytest.param({"max_tokens": 0}, "INVALID_ARGUMENT", id="no output wanted"),
        pytest.param({"token_ids": range(9000)}, "INVALID_ARGUMENT", id="too long"),
        pytest.param(
            {"sampling": engine_pb2.Sampling(max_tokens=1, logprobs=2**32 - 1)}, "INVALID_ARGUMENT", id="all logprobs"
        ),
    ],
)
async def test_rejected_submits(hosted, fields, code):
    async with hosted() as worker, session(worker) as client:
        await client.submit(5, **fields)
        rejected = (await client.read()).rejected
        assert (rejected.stream_id, rejected.code) == (5, code)
        await client.submit(5, max_tokens=2)
        await client.until_finished(5)
        await worker.idle()


async def test_refused_when_full_draining_or_named_twice(hosted):
    async with hosted(max_queued=0, sim={"max_num_seqs": 1}) as worker, session(worker) as client:
        await client.submit(1, max_tokens=5000)
        await client.submit(1)
        await client.submit(2)
        while len(client.rejected) < 2:
            await client.read()
        assert client.rejected[1].code == "INVALID_ARGUMENT"
        assert client.rejected[2].code == "RESOURCE_EXHAUSTED"
        worker.host.admission.set_draining(True)
        await client.submit(3)
        while len(client.rejected) < 3:
            await client.read()
        assert client.rejected[3].code == "UNAVAILABLE"
        assert "draining" in client.rejected[3].detail
        assert worker.registry.get_sample_value("omni_worker_refused_total") == 2


async def test_deadline_ends_a_sequence(hosted):
    async with hosted() as worker, session(worker) as client:
        await client.submit(1, max_tokens=5000, deadline_ms=30)
        await client.until_finished(1)
        assert client.finishes[1].reason == engine_pb2.FINISH_REASON_ERROR
        assert client.finishes[1].detail == "deadline"
        await worker.idle()


async def test_what_the_engine_does_not_take_in_time_has_failed(hosted, monkeypatch):
    """It is not rejected, which would pass the handle on: the engine may have got it and pull."""
    async with hosted(submit_timeout_s=0.05) as worker, session(worker) as client:
        take = worker.engine.submit

        async def submit(job, sink):
            await take(job, sink)
            await asyncio.Event().wait()

        monkeypatch.setattr(worker.engine, "submit", submit)
        await client.submit(1, max_tokens=5000)
        await client.until_finished(1)
        assert client.finishes[1].reason == engine_pb2.FINISH_REASON_ERROR
        assert not client.rejected
        await worker.idle()


async def test_unacknowledged_frames_pause_and_coalesce(hosted, until):
    async with hosted(frame_window=2) as worker, session(worker) as client:
        await client.submit(1, max_tokens=30)
        await client.submit(2, max_tokens=30, token_ids=PROMPT[:-1])
        await until(lambda: worker.engine.stats().generated_tokens >= 60)
        first = await client.read(ack=False), await client.read(ack=False)
        assert not client.finishes
        await client.send(ack=wire.Ack(frame=first[-1].step.frame))
        await client.until_finished(1, 2)
        assert len(client.frames) == 3
        last = client.frames[-1]
        assert len(set(last.stream_ids)) == len(last.stream_ids)
        assert [len(client.tokens[i]) for i in (1, 2)] == [30, 30]


async def test_a_peer_that_never_acknowledges_loses_its_session(hosted):
    async with hosted(frame_window=1, max_pending_tokens=10) as worker, session(worker) as client:
        await client.submit(1, max_tokens=5000)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            while await client.read(ack=False):
                pass
        assert ended.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await worker.idle()


async def test_a_peer_that_reads_nothing_is_not_read_either(hosted):
    """Each refusal waits to be told, and nobody takes them out."""
    async with hosted() as worker:
        host, limits = worker.host, SessionLimits(frame_window=1, max_pending_tokens=10, submit_timeout_s=1.0)
        metrics = WorkerMetrics(CollectorRegistry())
        shared = DecodeHost(worker.engine, host.admission, host.accounts, Background(), metrics, host.identity, limits)
        taken = itertools.count(1)

        async def endless():
            while True:
                yield wire.SessionRequest(submit=wire.Submit(stream_id=next(taken), model="another"))

        async with asyncio.timeout(5):
            await Session(shared, 1, "test").read(endless())
        assert next(taken) == 12


@pytest.mark.parametrize(
    "message", [{"ack": wire.Ack(frame=1)}, {"submit": wire.Submit(stream_id=1)}], ids=["ack", "submit"]
)
async def test_a_session_begins_with_hello(hosted, message):
    async with hosted() as worker:
        call = DecodeServiceStub(worker.channel).Session(timeout=5)
        await call.write(wire.SessionRequest(**message))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_session_without_hello_ends(hosted, monkeypatch):
    monkeypatch.setattr(hosting_session, "_HELLO_TIMEOUT_S", 0.05)
    async with hosted() as worker:
        call = DecodeServiceStub(worker.channel).Session(timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await call.read()
        assert from_rpc_error(ended.value).reason == "silent"


async def test_dead_engine_ends_sequences_with_errors(hosted):
    async with hosted() as worker, session(worker) as client:
        await client.submit(1, max_tokens=5000)
        await client.read()
        worker.engine.die("gone")
        await client.until_finished(1)
        assert client.finishes[1].reason == engine_pb2.FINISH_REASON_ERROR
        await client.submit(2)
        while 2 not in client.rejected:
            await client.read()
        assert client.rejected[2].code == "UNAVAILABLE"


async def test_two_sessions_may_use_the_same_names(hosted):
    async with hosted() as worker, session(worker) as one, session(worker) as two:
        await one.submit(1)
        await two.submit(1)
        await one.until_finished(1)
        await two.until_finished(1)
        assert one.tokens == two.tokens


async def test_spans_continue_the_callers_trace(hosted, spans):
    tracer = trace.get_tracer("test")
    async with hosted() as prefill, hosted() as decode, session(decode) as client:
        with tracer.start_as_current_span("proxy.request") as root:
            sampling = engine_pb2.Sampling(max_tokens=4, ignore_eos=True)
            request = PrefillRequest(request_id="p", model="sim", token_ids=PROMPT, sampling=sampling)
            first = await prefill.prefill.Prefill(request, timeout=5, metadata=[("traceparent", traceparent())])
            await client.submit(1, kv_handle=first.kv_handle, traceparent=traceparent(), request_id="p")
            await client.submit(2, max_tokens=5000, traceparent=traceparent(), request_id="q")
            await client.until_finished(1)
        client.call.cancel()
        await decode.idle()
        ended = spans.get_finished_spans()
        legs = {s.attributes["omni.request_id"]: s for s in ended if s.name == "decode.sequence"}
        server = next(s for s in ended if s.name.endswith("PrefillService/Prefill"))
        for span in (server, *legs.values()):
            assert span.parent.span_id == root.get_span_context().span_id
            assert span.context.trace_id == root.get_span_context().trace_id
            assert not any("token_ids" in key for key in span.attributes)
        assert server.attributes["omni.prompt_tokens"] == len(PROMPT)
        assert server.attributes["omni.uncached_tokens"] == len(PROMPT)
        assert legs["p"].attributes["omni.pulled_tokens"] == len(PROMPT)
        assert legs["p"].attributes["omni.output_tokens"] == 8
        assert legs["p"].attributes["omni.finish_reason"] == "length"
        assert legs["p"].attributes["omni.transfer_ms"] > 0
        assert legs["q"].attributes["omni.finish_reason"] == "abort"
