"""The service as its users run it: a process with OMNI_DECODE_* settings, on a simulated engine."""

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager

import pytest

from omni.decode.v1.decode_service_pb2 import Hello, SessionRequest, Submit
from omni.decode.v1.decode_service_pb2_grpc import DecodeServiceStub
from omni.engine.v1 import engine_pb2
from omni.engine.v1.engine_pb2 import Sampling
from omni.engine.v1.worker_service_pb2 import DescribeRequest
from omni.engine.v1.worker_service_pb2_grpc import WorkerServiceStub
from omni_common.errors import InvalidRequest
from omni_common.rpc import channel
from omni_decode.settings import Settings


@asynccontextmanager
async def process(**settings):
    own = {f"OMNI_DECODE_{name.upper()}": value for name, value in {"engine": "sim", **settings}.items()}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMNI_")} | own
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "omni_decode", stderr=asyncio.subprocess.PIPE, env=environment
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        # Reads what is left, so that the pipe is closed before the loop is.
        await started.communicate()


async def line(started, message):
    async with asyncio.timeout(30):
        while raw := await started.stderr.readline():
            entry = json.loads(raw)
            if entry["message"] == message:
                return entry
    raise AssertionError(f"the process ended without logging {message!r}")


async def test_serves_its_role_and_drains_on_sigterm():
    async with process() as started:
        address = (await line(started, "serving"))["address"]
        async with channel(address) as connected:
            info = (await WorkerServiceStub(connected).Describe(DescribeRequest(), timeout=5)).info
        assert info.role == engine_pb2.ROLE_DECODE
        assert info.worker_id.startswith("decode-")
        started.send_signal(signal.SIGTERM)
        await line(started, "drained")
        async with asyncio.timeout(15):
            assert await started.wait() == 0


async def test_a_wrong_submit_is_rejected_with_its_field():
    async with process() as started:
        address = (await line(started, "serving"))["address"]
        async with channel(address) as connected, asyncio.timeout(10):
            call = DecodeServiceStub(connected).Session()
            await call.write(SessionRequest(hello=Hello()))
            await call.write(SessionRequest(submit=Submit(stream_id=7, model="sim", sampling=Sampling(max_tokens=1))))
            await call.read()
            rejected = (await call.read()).rejected
            call.cancel()
        assert (rejected.stream_id, rejected.code, rejected.field) == (7, "INVALID_ARGUMENT", "token_ids")


async def test_a_dead_engine_ends_the_process_with_1():
    async with process(sim__faults__die_after_s="0.05") as started:
        entry = await line(started, "engine gone")
        assert "on purpose" in entry["reason"]
        async with asyncio.timeout(15):
            assert await started.wait() == 1


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [("modle_dir", "x", b"OMNI_DECODE_MODEL_DIR"), ("kvstore", "kv", b"(OMNI_DECODE_KVSTORE): 'kv': write host:port")],
)
async def test_a_wrong_setting_ends_the_process_with_2(setting, value, named):
    async with process(**{setting: value}) as started:
        async with asyncio.timeout(30):
            _, errors = await started.communicate()
        assert started.returncode == 2
        assert named in errors and errors.count(b"\n") == 1


@pytest.mark.parametrize(
    ("variable", "value"),
    [("ROLE", "encode"), ("SIM__NUM_BLOCKS", "1"), ("PORT", "70000"), ("SIM__FAULTS__FAIL_PULLS", "2")],
)
def test_settings_out_of_range_are_named(variable, value):
    with pytest.raises(InvalidRequest) as refused:
        Settings.load({f"OMNI_DECODE_{variable}": value})
    assert variable.split("__")[0].lower() in str(refused.value)


@pytest.mark.parametrize("variable", ["OMNI_DECODE_KVSTORE", "OMNI_DECODE_PLACEMENT"])
@pytest.mark.parametrize("address", ["kv", "kv:0", "http://kv:50051", "fd00::1:50051"])
def test_an_address_without_host_or_port_is_refused_by_name(variable, address):
    with pytest.raises(InvalidRequest, match=rf"\({variable}\): '{address}': write host:port"):
        Settings.load({variable: address})


@pytest.mark.parametrize(
    ("host", "address"),
    [("node-1", "node-1:7001"), ("fd00::1", "[fd00::1]:7001"), ("[fd00::1]", "[fd00::1]:7001")],
)
def test_a_worker_is_reached_by_the_host_it_advertises(host, address):
    assert Settings.load({"OMNI_DECODE_ADVERTISE_HOST": host}).address_at(7001) == address


def test_role_and_name_have_defaults_of_the_service(tmp_path):
    settings = Settings.load({"OMNI_DECODE_MODEL_DIR": str(tmp_path / "tiny")})
    assert settings.role == "decode"
    assert settings.model_name == "tiny"
    assert settings.name_at(7001).startswith("decode-") and settings.name_at(7001).endswith("-7001")
