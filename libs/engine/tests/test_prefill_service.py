import grpc
import pytest

from omni.engine.v1 import engine_pb2
from omni.prefill.v1.prefill_service_pb2 import PrefillRequest, ReleaseKvRequest
from omni_common.errors import FailedPrecondition, InvalidRequest, ResourceExhausted, Unavailable
from omni_common.rpc_errors import from_rpc_error

PROMPT = list(range(100, 170))


def request(**fields):
    defaults = {
        "request_id": "p",
        "model": "sim",
        "token_ids": PROMPT,
        "sampling": engine_pb2.Sampling(max_tokens=4, ignore_eos=True),
    }
    return PrefillRequest(**(defaults | fields))


async def refused(call):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return from_rpc_error(error.value)


async def test_answer_carries_token_handle_and_timings(hosted):
    async with hosted() as worker:
        sampling = engine_pb2.Sampling(max_tokens=4, ignore_eos=True, logprobs=2)
        answer = await worker.prefill.Prefill(request(sampling=sampling), timeout=5)
        assert answer.worker_id == worker.host.identity.worker_id
        assert answer.epoch == worker.host.identity.epoch
        assert answer.kv_handle.lease_id == "p"
        assert (answer.kv_handle.num_tokens, answer.kv_handle.num_blocks, answer.kv_handle.block_size) == (70, 5, 16)
        assert answer.kv_handle.lease_s > 0
        assert answer.finish_reason == engine_pb2.FINISH_REASON_UNSPECIFIED
        assert answer.logprobs.width == 3
        assert answer.logprobs.token_ids[0] == answer.first_token_id
        assert answer.timings.compute_ms > 0
        again = await worker.prefill.Prefill(request(request_id="q"), timeout=5)
        assert again.cached_tokens == 64
        assert worker.engine.stats().leases == 2
        for lease, released in (("p", True), ("p", False), ("q", True), ("never", False)):
            answer = await worker.prefill.ReleaseKv(ReleaseKvRequest(lease_id=lease), timeout=5)
            assert answer.released is released
        await worker.idle()
        sample = worker.registry.get_sample_value
        assert sample("omni_worker_prompt_tokens_total", {"source": "cached"}) == 64
        assert sample("omni_worker_prefill_seconds_count") == 2


async def test_a_sequence_that_ends_at_once_has_no_handle(hosted):
    async with hosted() as worker:
        first = (await worker.prefill.Prefill(request(), timeout=5)).first_token_id
        sampling = engine_pb2.Sampling(max_tokens=4, ignore_eos=True, stop_token_ids=[first])
        answer = await worker.prefill.Prefill(request(request_id="s", sampling=sampling), timeout=5)
        assert answer.finish_reason == engine_pb2.FINISH_REASON_STOP
        assert not answer.HasField("kv_handle")


@pytest.mark.parametrize(
    ("fields", "kind", "field"),
    [
        pytest.param({"model": "other"}, FailedPrecondition, None, id="wrong model"),
        pytest.param({"token_ids": []}, InvalidRequest, "token_ids", id="no tokens"),
        pytest.param({"token_ids": range(9000)}, InvalidRequest, "token_ids", id="too long"),
        pytest.param({"request_id": ""}, InvalidRequest, "request_id", id="no name"),
        pytest.param({"sampling": None}, InvalidRequest, "sampling.max_tokens", id="no sampling"),
    ],
)
async def test_refused_requests(hosted, fields, kind, field):
    async with hosted() as worker:
        error = await refused(worker.prefill.Prefill(request(**fields), timeout=5))
        assert (type(error), error.field) == (kind, field)
        await worker.idle()


async def test_bounded_and_draining(hosted, until):
    async with hosted(max_queued=0, sim={"max_num_seqs": 1, "faults": {"slow_factor": 100}}) as worker:
        running = worker.prefill.Prefill(request(), timeout=20)
        await until(lambda: worker.host.admission.active)
        error = await refused(worker.prefill.Prefill(request(request_id="q"), timeout=5))
        assert isinstance(error, ResourceExhausted)
        assert error.retry_after_s is not None and error.retry_after_s > 0
        worker.host.admission.set_draining(True)
        error = await refused(worker.prefill.Prefill(request(request_id="q"), timeout=5))
        assert isinstance(error, Unavailable)
        assert error.reason == "draining"
        running.cancel()
        await worker.idle()


@pytest.mark.parametrize("ending", ["cancel", "deadline"])
async def test_an_ended_call_frees_its_blocks(hosted, ending, until):
    async with hosted(sim={"faults": {"slow_factor": 100}}) as worker:
        call = worker.prefill.Prefill(request(), timeout=0.1 if ending == "deadline" else 20)
        await until(lambda: worker.engine.stats().kv_usage)
        if ending == "cancel":
            call.cancel()
        await worker.idle()
        assert worker.engine.stats().leases == 0
