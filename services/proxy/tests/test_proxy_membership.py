"""Workers learnt from a kvstore, and what stays when it goes."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from omni.engine.v1 import engine_pb2
from omni.kvstore.v1 import kvstore_service_pb2 as pb
from omni.kvstore.v1 import kvstore_service_pb2_grpc
from omni_common.rpc import Server, Servicer


class FakeKvStore(kvstore_service_pb2_grpc.KvStoreServiceServicer):
    """Replays what it is told to; a None ends the stream."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[pb.WatchResponse | None] = asyncio.Queue()
        self.watchers = 0

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[pb.WatchResponse]:
        self.watchers += 1
        while (message := await self.messages.get()) is not None:
            yield message


@pytest.fixture
async def kvstore() -> AsyncIterator[tuple[FakeKvStore, str]]:
    fake = FakeKvStore()
    add = kvstore_service_pb2_grpc.add_KvStoreServiceServicer_to_server
    server = Server([Servicer(fake, add, "omni.kvstore.v1.KvStoreService")])
    port = await server.start("127.0.0.1:0")
    yield fake, f"127.0.0.1:{port}"
    await server.stop(0)


async def until(fleet: Any, condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await fleet.changed()


def state(fleet: Any) -> dict[str, str | None]:
    return {m.worker.id: m.refusal for m in fleet.members}


async def test_workers_come_drain_and_leave(start, kvstore):
    fake, address = kvstore
    others = await start("p1 d1 d2")
    stack = await start("", {"kvstore": address})
    fleet = stack.proxy.fleet

    def change(name: str, **more: Any) -> pb.WorkerChange:
        return pb.WorkerChange(info=others[name].info(), **more)

    fake.messages.put_nowait(pb.WatchResponse(version=1, snapshot=True, workers=[change("p1"), change("d1")]))
    await until(fleet, lambda: state(fleet) == {"p1": None, "d1": None})
    assert (await stack.chat()).status_code == 200

    fake.messages.put_nowait(pb.WatchResponse(version=2, workers=[change("d2"), change("d1", draining=True)]))
    await until(fleet, lambda: state(fleet) == {"p1": None, "d1": "draining", "d2": None})
    others["d2"].submits.clear()
    assert (await stack.chat()).status_code == 200
    assert others["d2"].submits

    fake.messages.put_nowait(pb.WatchResponse(version=3, workers=[change("d1", removed=True)]))
    await until(fleet, lambda: set(state(fleet)) == {"p1", "d2"})


async def test_the_last_list_stays_when_the_kvstore_goes(start, kvstore):
    fake, address = kvstore
    others = await start("d1")
    stack = await start("", {"kvstore": address})
    snapshot = pb.WatchResponse(version=1, snapshot=True, workers=[pb.WorkerChange(info=others["d1"].info())])
    fake.messages.put_nowait(snapshot)
    await until(stack.proxy.fleet, lambda: stack.proxy.fleet.can_decode)
    # A store that comes back empty does not take away workers that still answer.
    fake.messages.put_nowait(None)
    fake.messages.put_nowait(pb.WatchResponse(version=1, snapshot=True))
    async with asyncio.timeout(5):
        while fake.watchers < 2 or not fake.messages.empty():
            await stack.client.get("/health")
    assert (await stack.chat()).status_code == 200
    assert (await stack.client.get("/ready")).status_code == 200


async def test_a_new_epoch_replaces_the_worker(start, kvstore):
    fake, address = kvstore
    others = await start("d1")
    stack = await start("", {"kvstore": address})
    fleet = stack.proxy.fleet
    for epoch in (5, 4, 6):
        info = others["d1"].info()
        info.epoch = epoch
        fake.messages.put_nowait(pb.WatchResponse(version=epoch, workers=[pb.WorkerChange(info=info)]))
    await until(fleet, lambda: [m.worker.epoch for m in fleet.members] == [6])
    await until(fleet, lambda: fleet.can_decode)
    assert (await stack.chat()).status_code == 200


async def test_a_worker_told_again_with_another_role_keeps_its_link(start, kvstore):
    fake, address = kvstore
    others = await start("d1")
    stack = await start("", {"kvstore": address})
    fleet, info = stack.proxy.fleet, others["d1"].info()
    fake.messages.put_nowait(pb.WatchResponse(version=1, workers=[pb.WorkerChange(info=info)]))
    await until(fleet, lambda: fleet.can_decode)
    member = fleet.get("d1")
    info.role = engine_pb2.ROLE_BOTH
    info.labels["omni.group"] = "west"
    fake.messages.put_nowait(pb.WatchResponse(version=2, workers=[pb.WorkerChange(info=info)]))
    await until(fleet, lambda: member.worker.role == "both")
    assert fleet.get("d1") is member
    assert member.worker.labels == {"omni.group": "west"}
    assert member.prefill is not None
    assert (await stack.chat()).status_code == 200


async def test_workers_of_another_model_are_not_used(start, kvstore):
    fake, address = kvstore
    others = await start("d1", model="other")
    stack = await start("", {"kvstore": address})
    fake.messages.put_nowait(pb.WatchResponse(version=1, workers=[pb.WorkerChange(info=others["d1"].info())]))
    await until(stack.proxy.fleet, lambda: state(stack.proxy.fleet) == {"d1": None})
    response = await stack.client.get("/ready")
    assert response.status_code == 503
    assert response.json()["parts"]["workers"] == {"d1": "serves other"}
    assert others["d1"].role == engine_pb2.ROLE_DECODE


async def test_a_static_worker_that_never_answers_is_shown_with_its_address(start):
    others = await start("d1")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        stack = await start("", {"workers": (others["d1"].address, address)})
        async with asyncio.timeout(10):
            while True:
                ready = (await stack.client.get("/ready")).json()
                if ready["ready"] and "no answer yet" not in ready["parts"]["workers"][address]:
                    break
        workers = ready["parts"]["workers"]
        assert set(workers) == {"d1", address}
        assert workers["d1"] == "ok" and workers[address].startswith("unreachable: ")
        page = (await stack.client.get("/workers")).json()
        assert [w["id"] for w in page["workers"]] == ["d1"]
        assert page["unreachable"] == [{"address": address, "state": workers[address]}]


async def test_a_static_worker_that_loads_says_so_until_it_is_a_member(start):
    others = await start("d1")
    worker = others["d1"]
    worker.is_loading = True
    stack = await start("", {"workers": (worker.address,), "connect_timeout_s": 0.5})
    async with asyncio.timeout(10):
        while "the engine is not ready" not in (await _workers_of(stack)).values():
            continue
        assert set(await _workers_of(stack)) == {worker.address}
        worker.is_loading = False
        while await _workers_of(stack) != {"d1": "ok"}:
            continue
    assert (await stack.client.get("/workers")).json()["unreachable"] == []


async def _workers_of(stack: Any) -> dict[str, str]:
    parts: dict[str, Any] = (await stack.client.get("/ready")).json()["parts"]
    states: dict[str, str] = parts["workers"]
    return states
