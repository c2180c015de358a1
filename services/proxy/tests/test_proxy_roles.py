"""A worker changes its role while a proxy is linked to it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from omni.decode.v1 import decode_service_pb2 as decode_pb
from omni.decode.v1 import decode_service_pb2_grpc
from omni.engine.v1 import engine_pb2, worker_service_pb2, worker_service_pb2_grpc
from omni_common.rpc import Server, Servicer, channel
from omni_proxy.links import WorkerLink
from omni_proxy.metrics import Metrics
from omni_proxy.ports import Submission
from omni_proxy.sampling import Sampling
from omni_proxy.wire import worker_from_wire
from omni_proxy.worker import Role

WATCH = "omni.engine.v1.WorkerService"
DECODE = "omni.decode.v1.DecodeService"


@dataclass
class ScriptedWorker:
    """Tells the loads it is given, and gives one token for each `step`."""

    loads: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    steps: asyncio.Queue[bool] = field(default_factory=asyncio.Queue)
    asked: list[worker_service_pb2.WatchStatsRequest] = field(default_factory=list)
    sessions: int = 0

    async def WatchStats(self, request: Any, context: Any) -> AsyncIterator[worker_service_pb2.WatchStatsResponse]:
        self.asked.append(request)
        while True:
            yield worker_service_pb2.WatchStatsResponse(worker_id="w", epoch=1, **await self.loads.get())

    async def Session(self, requests: Any, context: Any) -> AsyncIterator[decode_pb.SessionResponse]:
        assert (await anext(requests)).hello.proxy_id == "me"
        self.sessions += 1
        yield decode_pb.SessionResponse(welcome=decode_pb.Welcome(worker_id="w", epoch=1, frame_window=8))
        submit = (await anext(requests)).submit
        frame = 0
        while True:
            frame, is_last = frame + 1, await self.steps.get()
            step = decode_pb.StepFrame(frame=frame, stream_ids=[submit.stream_id], token_ids=[frame])
            if is_last:
                step.finishes.add(stream_id=submit.stream_id, reason=engine_pb2.FINISH_REASON_LENGTH)
            yield decode_pb.SessionResponse(step=step)

    def __getattr__(self, name: str) -> Any:
        """The calls that these tests do not make."""
        if not name[:1].isupper():
            raise AttributeError(name)
        return None


@asynccontextmanager
async def linked(role: engine_pb2.Role) -> AsyncIterator[tuple[ScriptedWorker, WorkerLink, Callable[..., Any]]]:
    """A scripted worker, the link to it, and a wait for what a change of the link brings about."""
    scripted, changed = ScriptedWorker(), asyncio.Event()
    server = Server(
        [
            Servicer(scripted, worker_service_pb2_grpc.add_WorkerServiceServicer_to_server, WATCH),
            Servicer(scripted, decode_service_pb2_grpc.add_DecodeServiceServicer_to_server, DECODE),
        ]
    )
    address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"
    info = engine_pb2.WorkerInfo(worker_id="w", address=address, role=role, epoch=1, model="m", block_size=4)
    link = WorkerLink(
        worker_from_wire(info), channel(address), "me", 5.0, 50, Metrics(CollectorRegistry()), changed.set
    )
    running = asyncio.create_task(link.run())

    async def until(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                changed.clear()
                await changed.wait()

    try:
        yield scripted, link, until
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await server.stop(0)


async def test_a_prefill_worker_gets_a_session_when_it_decodes() -> None:
    async with linked(engine_pb2.ROLE_PREFILL) as (scripted, link, until):
        member = link.member
        scripted.loads.put_nowait({"role": engine_pb2.ROLE_PREFILL})
        await until(lambda: member.is_reachable)
        assert member.prefill is not None
        assert (member.decode, scripted.sessions, member.refusal) == (None, 0, None)
        scripted.loads.put_nowait({"role": engine_pb2.ROLE_DECODE})
        await until(lambda: member.decode is not None and member.decode.ready)
        assert (member.worker.role, member.prefill, member.refusal) == (Role.DECODE, None, None)
        scripted.loads.put_nowait({"role": engine_pb2.ROLE_BOTH})
        await until(lambda: member.worker.role is Role.BOTH)
        assert member.prefill is not None
        assert scripted.sessions == 1


async def test_a_sequence_outlives_the_role_it_runs_under() -> None:
    async with linked(engine_pb2.ROLE_DECODE) as (scripted, link, until):
        member = link.member
        scripted.loads.put_nowait({"role": engine_pb2.ROLE_DECODE})
        await until(lambda: member.refusal is None)
        assert member.decode is not None
        feed = member.decode.submit(Submission("r", "m", [1, 2], 0, Sampling(max_tokens=2), None, "", 0))
        scripted.steps.put_nowait(False)
        async with asyncio.timeout(10):
            await feed.wait()
        assert feed.take()[0] == [1]
        scripted.loads.put_nowait({"role": engine_pb2.ROLE_PREFILL})
        await until(lambda: member.decode is None)
        assert member.refusal is None
        idle = asyncio.create_task(link.wait_idle())
        scripted.steps.put_nowait(True)
        async with asyncio.timeout(10):
            while feed.end is None:
                await feed.wait()
            await idle
        assert feed.take()[0] == [2]
        assert feed.end.error is None


async def test_the_workers_own_word_on_its_role_counts_for_more() -> None:
    async with linked(engine_pb2.ROLE_PREFILL) as (scripted, link, until):
        member = link.member
        scripted.loads.put_nowait({})
        await until(lambda: member.is_reachable)
        link.announced(replace(member.worker, role=Role.DECODE))
        assert member.worker.role is Role.DECODE
        scripted.loads.put_nowait({"role": engine_pb2.ROLE_PREFILL})
        await until(lambda: member.worker.role is Role.PREFILL)
        link.announced(replace(member.worker, role=Role.DECODE, labels={"omni.group": "west"}))
        assert (member.worker.role, dict(member.worker.labels)) == (Role.PREFILL, {"omni.group": "west"})


async def test_the_load_tells_the_work_of_others() -> None:
    async with linked(engine_pb2.ROLE_DECODE) as (scripted, link, until):
        told = {
            "others_prefills": 2, "others_uncached_tokens": 300, "others_sequences": 4, "context_tokens": 5000,
            "steps": 60, "busy_ms": 700.5, "running": 8,
        }  # fmt: skip
        scripted.loads.put_nowait(told)
        await until(lambda: link.member.is_reachable)
        assert {name: getattr(link.member.load, name) for name in told} == told
        assert [(request.proxy_id, request.min_interval_ms) for request in scripted.asked] == [("me", 50)]


@pytest.mark.parametrize(
    ("wire", "role"), [(engine_pb2.ROLE_PREFILL, Role.PREFILL), (engine_pb2.ROLE_UNSPECIFIED, Role.BOTH)]
)
def test_a_workers_shape_and_labels_are_read(wire: engine_pb2.Role, role: Role) -> None:
    info = engine_pb2.WorkerInfo(role=wire, num_blocks=9, max_num_batched_tokens=512, labels={"omni.group": "g"})
    worker = worker_from_wire(info)
    assert (worker.role, worker.num_blocks, worker.max_num_batched_tokens) == (role, 9, 512)
    assert dict(worker.labels) == {"omni.group": "g"}
