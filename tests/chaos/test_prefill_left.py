"""Callers leave around the moment their prompt is computed, over the real wire: no lease is left to run out."""

import asyncio
import time

import pytest
from prometheus_client import CollectorRegistry

from omni_common.errors import DeadlineExceeded
from omni_common.rpc import channel
from omni_engine.hosting.host import WorkerHost
from omni_engine.hosting.settings import WorkerSettings
from omni_engine.sim import SimEngine
from omni_proxy.health import HealthSettings
from omni_proxy.links import PrefillClient
from omni_proxy.ports import PrefillAnswer, PrefillOrder
from omni_proxy.sampling import Sampling
from omni_proxy.stalls import StallWatch

CALLS, LONG_S = 150, 10.0


class Settings(WorkerSettings):
    service = "decode"


async def leave_after(client: PrefillClient, number: int, seconds: float, *, by_deadline: bool = False) -> None:
    order = PrefillOrder(f"r{number}", "sim", [number + 1] * 20, Sampling(4, ignore_eos=True), b"")
    deadline_s, leaves_s = (seconds, LONG_S) if by_deadline else (LONG_S, seconds)
    call: asyncio.Task[PrefillAnswer] = asyncio.create_task(client.prefill(order, deadline_s, {}))
    await asyncio.wait({call}, timeout=leaves_s)
    call.cancel()
    await asyncio.wait({call})
    if not call.cancelled() and not isinstance(call.exception(), DeadlineExceeded):
        handle = call.result().kv_handle
        assert handle is not None
        client.release(handle.lease_id)


@pytest.mark.parametrize("by_deadline", [False, True])
async def test_no_lease_outlives_its_caller(by_deadline: bool) -> None:
    settings = Settings.model_validate({"engine": "sim", "sim": {"timing": {"prefill_base_ms": 2}, "lease_s": 600}})
    engine = SimEngine(settings.sim)
    host = WorkerHost(settings, engine, CollectorRegistry())
    address = f"127.0.0.1:{await host.start()}"
    serving = asyncio.create_task(host.serve())
    try:
        async with asyncio.timeout(60), channel(address) as connected:
            while not host.admission.is_ready:
                await host.admission.changed(0.1)
            client = PrefillClient(connected, StallWatch(lambda: HealthSettings.model_validate({})))
            await leave_after(client, CALLS, LONG_S)
            began_s = time.perf_counter()
            await leave_after(client, CALLS + 1, LONG_S)
            whole_s = time.perf_counter() - began_s
            for number in range(CALLS):
                await leave_after(client, number, 1.5 * whole_s * number / CALLS, by_deadline=by_deadline)
            await client.close()
            async with asyncio.timeout(10):
                while engine.stats().kv_usage or engine.stats().leases:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
    finally:
        serving.cancel()
        await asyncio.wait({serving})
        await host.close()
