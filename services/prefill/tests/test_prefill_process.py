"""The service as its users run it: a process with OMNI_PREFILL_* settings, on a simulated engine."""

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager

import pytest

from omni.engine.v1 import engine_pb2
from omni.engine.v1.worker_service_pb2 import DescribeRequest
from omni.engine.v1.worker_service_pb2_grpc import WorkerServiceStub
from omni_common.rpc import channel
from omni_prefill.settings import Settings


@asynccontextmanager
async def process(**settings):
    own = {f"OMNI_PREFILL_{name.upper()}": value for name, value in {"engine": "sim", **settings}.items()}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMNI_")} | own
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "omni_prefill", stderr=asyncio.subprocess.PIPE, env=environment
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
        assert info.role == engine_pb2.ROLE_PREFILL
        assert info.worker_id.startswith("prefill-")
        started.send_signal(signal.SIGTERM)
        await line(started, "drained")
        async with asyncio.timeout(15):
            assert await started.wait() == 0


async def test_a_dead_engine_ends_the_process_with_1():
    async with process(sim__faults__die_after_s="0.05") as started:
        entry = await line(started, "engine gone")
        assert "on purpose" in entry["reason"]
        async with asyncio.timeout(15):
            assert await started.wait() == 1


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("modle_dir", "x", b"OMNI_PREFILL_MODEL_DIR"),
        ("kvstore", "kv", b"(OMNI_PREFILL_KVSTORE): 'kv': write host:port"),
    ],
)
async def test_a_wrong_setting_ends_the_process_with_2(setting, value, named):
    async with process(**{setting: value}) as started:
        async with asyncio.timeout(30):
            _, errors = await started.communicate()
        assert started.returncode == 2
        assert named in errors and errors.count(b"\n") == 1


def test_role_and_name_have_defaults_of_the_service(tmp_path):
    settings = Settings.load({"OMNI_PREFILL_MODEL_DIR": str(tmp_path / "tiny")})
    assert settings.role == "prefill"
    assert settings.model_name == "tiny"
    assert settings.name_at(7001).startswith("prefill-") and settings.name_at(7001).endswith("-7001")
