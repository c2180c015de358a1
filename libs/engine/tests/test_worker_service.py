import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from omni.engine.v1 import engine_pb2
from omni.engine.v1.worker_service_pb2 import DescribeRequest, DrainRequest, WatchStatsRequest
from omni.prefill.v1.prefill_service_pb2 import PrefillRequest, ReleaseKvRequest
from omni_common.errors import InvalidRequest, Unavailable
from omni_common.rpc import channel
from omni_common.rpc_errors import from_rpc_error
from omni_engine.hosting.engines import ENGINES
from omni_engine.hosting.settings import WorkerSettings


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


@pytest.mark.parametrize(
    ("role", "mounted"),
    [("prefill", {"prefill"}), ("decode", {"decode"}), ("both", {"prefill", "decode"})],
)
async def test_role_decides_what_is_served(hosted, role, mounted):
    async with hosted(role=role) as worker:
        health = health_pb2_grpc.HealthStub(worker.channel)
        for part in ("prefill", "decode"):
            name = f"omni.{part}.v1.{part.title()}Service"
            check = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            if part in mounted:
                assert (await check).status == health_pb2.HealthCheckResponse.SERVING
            else:
                with pytest.raises(grpc.aio.AioRpcError) as unknown:
                    await check
                assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


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
        worker.host.admission.set_draining(True)
        while not (await watch.read()).draining:
            pass
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
