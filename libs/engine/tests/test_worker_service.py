import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

sys.path.insert(0, str(Path(__file__).parent))

from decode_client import session

from omni.engine.v1 import engine_pb2
from omni.engine.v1.worker_service_pb2 import DescribeRequest, DrainRequest, WatchStatsRequest, WatchStatsResponse
from omni.prefill.v1.prefill_service_pb2 import PrefillRequest, ReleaseKvRequest
from omni_common.errors import InvalidRequest, Unavailable
from omni_common.rpc import channel
from omni_common.rpc_errors import from_rpc_error
from omni_engine.hosting.admission import Admission
from omni_engine.hosting.engines import ENGINES
from omni_engine.hosting.settings import WorkerSettings
from omni_engine.hosting.worker import WorkerServicer


def request(name="p"):
    sampling = engine_pb2.Sampling(max_tokens=4, ignore_eos=True)
    return PrefillRequest(request_id=name, model="sim", token_ids=range(50), sampling=sampling)


async def test_describe(hosted):
    async with hosted(role="both", labels={"host": "a"}, advertise_host="127.0.0.1") as worker:
        info = (await worker.worker.Describe(DescribeRequest(), timeout=5)).info
        assert info.worker_id == worker.host.identity.worker_id
        assert info.address == f"127.0.0.1:{worker.host.server.port}"
        assert (info.role, info.model, info.engine) == (engine_pb2.ROLE_BOTH, "sim", "sim")
        assert (info.block_size, info.num_blocks, info.kv_connector) == (16, 4096, "sim")
        assert info.epoch > 1_700_000_000_000
        assert dict(info.labels) == {"host": "a"}


async def test_group_is_a_label(hosted):
    async with hosted(labels={"host": "a"}, group="west") as worker:
        info = (await worker.worker.Describe(DescribeRequest(), timeout=5)).info
        assert dict(info.labels) == {"host": "a", "omni.group": "west"}


async def test_stats_come_at_once_and_on_change(hosted):
    async with hosted() as worker, asyncio.timeout(10):
        watch = worker.worker.WatchStats(WatchStatsRequest(min_interval_ms=10))
        first = await watch.read()
        assert (first.running, first.leases, first.draining) == (0, 0, False)
        await worker.prefill.Prefill(request(), timeout=5)
        while (load := await watch.read()).leases != 1:
            pass
        assert load.kv_usage > 0
        assert load.computed_prompt_tokens == 50
        watch.cancel()


async def test_draining_is_told_at_once(hosted):
    """Long before the interval is over."""
    async with hosted() as worker, asyncio.timeout(10):
        watch = worker.worker.WatchStats(WatchStatsRequest(min_interval_ms=3_600_000))
        assert not (await watch.read()).draining
        worker.host.admission.set_draining(True)
        assert (await watch.read()).draining
        watch.cancel()


async def test_draining_that_begins_while_a_report_is_on_its_way_is_told_at_once() -> None:
    admission = Admission("m")
    told = SimpleNamespace(load=lambda proxy_id: WatchStatsResponse(draining=admission.is_draining))
    servicer = WorkerServicer(told, admission, 1.0, lambda: None)  # type: ignore[arg-type]
    async with asyncio.timeout(10):
        watch = servicer.WatchStats(WatchStatsRequest(min_interval_ms=3_600_000), None)
        assert not (await anext(watch)).draining
        admission.set_draining(True)
        assert (await anext(watch)).draining
        await watch.aclose()


async def test_load_is_told_once_per_interval(hosted):
    async with hosted() as worker, asyncio.timeout(10):
        watch = worker.worker.WatchStats(WatchStatsRequest(min_interval_ms=60))
        loads, started_s = 0, asyncio.get_running_loop().time()
        for number in range(12):
            await worker.prefill.Prefill(request(f"p{number}"), timeout=5)
        while (await watch.read()).leases < 12:
            loads += 1
        assert loads <= 1 + (asyncio.get_running_loop().time() - started_s) / 0.06
        watch.cancel()


async def test_stats_keep_coming_without_change(hosted):
    async with hosted() as worker, asyncio.timeout(10):
        watch = worker.worker.WatchStats(WatchStatsRequest(min_interval_ms=10))
        assert await watch.read() == await watch.read()
        watch.cancel()


async def test_drain_waits_for_leases(hosted):
    async with hosted() as worker:
        await worker.prefill.Prefill(request(), timeout=5)
        left = await worker.worker.Drain(DrainRequest(), timeout=0.4)
        assert (left.drained, left.running, left.leases) == (False, 0, 1)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await worker.prefill.Prefill(request("q"), timeout=5)
        assert from_rpc_error(refused.value).reason == "draining"
        draining = worker.worker.Drain(DrainRequest(), timeout=10)
        await worker.prefill.ReleaseKv(ReleaseKvRequest(lease_id="p"), timeout=5)
        answer = await draining
        assert (answer.drained, answer.leases) == (True, 0)
        await worker.worker.Drain(DrainRequest(resume=True), timeout=5)
        await worker.prefill.Prefill(request("q"), timeout=5)


async def test_drain_lets_sequences_and_prefills_finish(hosted, until):
    async with hosted(sim={"faults": {"slow_factor": 20}}) as worker, session(worker, "a") as client:
        await client.submit(1, max_tokens=5)
        running = worker.prefill.Prefill(request(), timeout=10)
        await until(lambda: worker.host.admission.active == 2)
        draining = worker.worker.Drain(DrainRequest(), timeout=10)
        answer = await running
        await client.until_finished(1)
        assert len(client.tokens[1]) == 5
        assert not draining.done()
        await worker.prefill.ReleaseKv(ReleaseKvRequest(lease_id=answer.kv_handle.lease_id), timeout=5)
        assert (await draining).drained


async def test_not_serving_until_loaded(hosted):
    settings = WorkerSettings(engine="sim", sim={"start_s": 30})
    from prometheus_client import CollectorRegistry

    from omni_engine.hosting.host import WorkerHost

    host = WorkerHost(settings, ENGINES["sim"](settings), CollectorRegistry())
    port = await host.start()
    serving = asyncio.create_task(host.serve())
    async with channel(f"127.0.0.1:{port}") as connected:
        health = health_pb2_grpc.HealthStub(connected)
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        from omni.engine.v1.worker_service_pb2_grpc import WorkerServiceStub

        with pytest.raises(grpc.aio.AioRpcError) as loading:
            await WorkerServiceStub(connected).Describe(DescribeRequest(), timeout=5)
        error = from_rpc_error(loading.value)
        assert isinstance(error, Unavailable)
        assert error.reason == "loading"
    serving.cancel()
    await asyncio.wait({serving})
    await host.close()


async def test_vllm_needs_a_model():
    with pytest.raises(InvalidRequest) as missing:
        ENGINES["vllm"](WorkerSettings())
    assert missing.value.field == "model_dir"
