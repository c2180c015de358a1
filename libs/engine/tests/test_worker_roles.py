"""A worker changes its role by command: what runs goes on, new work of a leg it no longer has is refused."""

import asyncio
import sys
from pathlib import Path

import grpc
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from decode_client import session
from scripted_kvstore import kvstore

from omni.engine.v1 import engine_pb2
from omni.engine.v1.worker_service_pb2 import DescribeRequest, SetRoleRequest, WatchStatsRequest
from omni.prefill.v1.prefill_service_pb2 import PrefillRequest
from omni_common.errors import FailedPrecondition, InvalidRequest, OmniError
from omni_common.rpc_errors import from_rpc_error

PREFILL, DECODE, BOTH = engine_pb2.ROLE_PREFILL, engine_pb2.ROLE_DECODE, engine_pb2.ROLE_BOTH
PROMPT = list(range(100, 170))


def prefill(worker, name="p"):
    sampling = engine_pb2.Sampling(max_tokens=4, ignore_eos=True)
    request = PrefillRequest(request_id=name, model="sim", token_ids=PROMPT, sampling=sampling)
    return worker.prefill.Prefill(request, timeout=5)


async def set_role(worker, role):
    answer = await worker.worker.SetRole(SetRoleRequest(role=role), timeout=5)
    return answer.role, answer.previous


async def refused(call) -> OmniError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return from_rpc_error(error.value)


@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
async def test_only_the_legs_of_the_role_are_taken(hosted, role):
    async with hosted(role=role) as worker, session(worker) as client:
        if role == "decode":
            error = await refused(prefill(worker))
            assert isinstance(error, FailedPrecondition)
            assert error.reason == "wrong_role"
        else:
            await prefill(worker)
        await client.submit(1, max_tokens=2)
        if role == "prefill":
            rejected = (await client.read()).rejected
            assert (rejected.stream_id, rejected.code) == (1, "FAILED_PRECONDITION")
        else:
            await client.until_finished(1)


async def test_what_runs_outlives_its_role(hosted):
    async with hosted(role="decode") as worker, session(worker) as client:
        await client.submit(1, max_tokens=30)
        while not client.tokens:
            await client.read()
        assert await set_role(worker, PREFILL) == (PREFILL, DECODE)
        await client.submit(2)
        await prefill(worker)
        await client.until_finished(1)
        assert len(client.tokens[1]) == 30
        assert client.rejected[2].code == "FAILED_PRECONDITION"
        assert await set_role(worker, BOTH) == (BOTH, PREFILL)
        await client.submit(3, max_tokens=2)
        await client.until_finished(3)
        await prefill(worker, "q")


async def test_the_role_is_told_to_everybody_in_the_same_epoch(hosted):
    async with kvstore() as store, hosted(role="prefill", kvstore=f"127.0.0.1:{store.port}") as worker:
        await store.until(lambda: store.registers)
        watch = worker.worker.WatchStats(WatchStatsRequest(min_interval_ms=3_600_000))
        async with asyncio.timeout(10):
            assert (await watch.read()).role == PREFILL
            await set_role(worker, DECODE)
            assert (await watch.read()).role == DECODE
        info = (await worker.worker.Describe(DescribeRequest(), timeout=5)).info
        await store.until(lambda: [r.info for r in store.registers if r.HasField("info")][-1] == info)
        assert (info.role, info.epoch) == (DECODE, worker.host.identity.epoch)
        assert not store.registers[-1].leave
        watch.cancel()


@pytest.mark.parametrize("role", [engine_pb2.ROLE_UNSPECIFIED, engine_pb2.ROLE_STORE])
async def test_a_worker_takes_no_other_role(hosted, role):
    async with hosted(role="decode") as worker:
        error = await refused(set_role(worker, role))
        assert isinstance(error, InvalidRequest)
        assert error.field == "role"


async def test_an_engine_of_one_role_keeps_it(hosted):
    async with hosted(role="decode", sim={"fixed_role": "started as consumer"}) as worker:
        error = await refused(set_role(worker, PREFILL))
        assert isinstance(error, FailedPrecondition)
        assert (error.reason, error.message) == ("role_fixed", "started as consumer")
        assert await set_role(worker, DECODE) == (DECODE, DECODE)
