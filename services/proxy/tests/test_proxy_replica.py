"""The proxy's copy of the kvstore's index: snapshots, deltas, resumption, other replicas, pools, ageing."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from omni.engine.v1 import engine_pb2
from omni.kv.v1 import kv_pb2
from omni.kvstore.v1 import kvstore_service_pb2 as pb
from omni.kvstore.v1 import kvstore_service_pb2_grpc
from omni_common.blocks import KEY_BYTES, block_keys, root_key
from omni_common.rpc import Server, Servicer
from omni_proxy.settings import Settings

BLOCK = 7
PROMPT = list(range(100, 200))
KEYS = block_keys(PROMPT, BLOCK, root_key("tiny"))
HBM, HOST = kv_pb2.MEDIUM_HBM, kv_pb2.MEDIUM_HOST
Change = pb.WorkerChange | pb.BlockChange


def stored(worker: str, keys: bytes, medium: Any = HBM, epoch: int = 1, first: int = 0) -> pb.BlockChange:
    event = pb.BlockEvent(action=pb.BLOCK_ACTION_STORED, medium=medium, block_keys=keys, positions=[first])
    return pb.BlockChange(worker_id=worker, epoch=epoch, event=event)


def removed(worker: str, keys: bytes, medium: Any = HBM, epoch: int = 1) -> pb.BlockChange:
    event = pb.BlockEvent(action=pb.BLOCK_ACTION_REMOVED, medium=medium, block_keys=keys)
    return pb.BlockChange(worker_id=worker, epoch=epoch, event=event)


def cleared(worker: str, epoch: int = 1) -> pb.BlockChange:
    return pb.BlockChange(worker_id=worker, epoch=epoch, event=pb.BlockEvent(action=pb.BLOCK_ACTION_CLEARED))


def split(keys: bytes) -> list[bytes]:
    return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]


@dataclass
class Truth:
    """Who is a member and holds what; what several kvstore replicas over one Redis agree on."""

    dataset: str = "a"
    kept: int = 1000
    events: list[Change] = field(default_factory=list)
    workers: dict[str, engine_pb2.WorkerInfo] = field(default_factory=dict)
    blocks: dict[tuple[str, int], dict[bytes, int]] = field(default_factory=dict)
    grown: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def position(self) -> pb.WatchPosition:
        return pb.WatchPosition(dataset=self.dataset, event=len(self.events))

    def tell(self, *changes: Change) -> None:
        for change in changes:
            self.events.append(change)
            (self._move if isinstance(change, pb.WorkerChange) else self._put)(change)
        self.grown.set()
        self.grown = asyncio.Event()

    def _move(self, change: Any) -> None:
        worker = change.info.worker_id
        known = self.workers.get(worker)
        if change.removed or (known is not None and known.epoch != change.info.epoch):
            self.blocks = {key: held for key, held in self.blocks.items() if key[0] != worker}
        self.workers.pop(worker, None)
        if not change.removed:
            self.workers[worker] = change.info

    def _put(self, change: Any) -> None:
        event = change.event
        if self.workers[change.worker_id].epoch != change.epoch:
            return
        if event.action == pb.BLOCK_ACTION_CLEARED:
            self.blocks = {key: held for key, held in self.blocks.items() if key[0] != change.worker_id}
            return
        held = self.blocks.setdefault((change.worker_id, event.medium), {})
        for offset, key in enumerate(split(event.block_keys)):
            if event.action == pb.BLOCK_ACTION_STORED:
                held[key] = event.positions[0] + offset
            else:
                held.pop(key, None)

    def held(self) -> dict[tuple[str, int], dict[bytes, int]]:
        return {key: held for key, held in self.blocks.items() if held}


class KvStoreReplica(kvstore_service_pb2_grpc.KvStoreServiceServicer):
    """Watches of one truth. `lag` deltas a watcher may be behind before it is sent a snapshot instead."""

    def __init__(self, truth: Truth, page: int = 5, lag: int = 1000) -> None:
        self.truth, self.page, self.lag = truth, page, lag
        self.requests: list[pb.WatchRequest] = []
        self.cut = asyncio.Event()
        self.told = asyncio.Event()
        self.told.set()
        self.is_degraded = False
        self.address = ""
        self.pages_left: int | None = None

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[pb.WatchResponse]:
        self.requests.append(request)
        truth, at = self.truth, -1
        if request.HasField("resume") and request.resume.dataset == truth.dataset:
            missed = len(truth.events) - request.resume.event
            at = request.resume.event if 0 <= missed <= truth.kept else -1
            if missed == 0 and not self.cut.is_set():
                yield pb.WatchResponse(position=truth.position)
        while not self.cut.is_set():
            if at < 0 or len(truth.events) - at > self.lag:
                at = len(truth.events)
                for message in self._snapshot():
                    if self.pages_left == 0:
                        return
                    self.pages_left = None if self.pages_left is None else self.pages_left - 1
                    yield message
            elif at < len(truth.events):
                change = truth.events[at]
                at += 1
                message = pb.WatchResponse(position=pb.WatchPosition(dataset=truth.dataset, event=at))
                if self.is_degraded:
                    message = pb.WatchResponse(degraded=True)
                (message.workers if isinstance(change, pb.WorkerChange) else message.blocks).append(change)
                yield message
            else:
                await self._until(truth.grown)
            await self._until(self.told)

    async def _until(self, event: asyncio.Event) -> None:
        waits = [asyncio.ensure_future(event.wait()), asyncio.ensure_future(self.cut.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def _snapshot(self) -> list[pb.WatchResponse]:
        truth = self.truth
        workers = [pb.WorkerChange(info=info) for info in truth.workers.values()]
        messages = [pb.WatchResponse(snapshot=True, workers=workers, degraded=self.is_degraded)]
        for (worker, medium), held in truth.blocks.items():
            entries = list(held.items())
            for start in range(0, len(entries), self.page):
                part = entries[start : start + self.page]
                event = pb.BlockEvent(action=pb.BLOCK_ACTION_STORED, medium=medium)
                event.block_keys = b"".join(key for key, _ in part)
                event.positions.extend(position for _, position in part)
                change = pb.BlockChange(worker_id=worker, epoch=truth.workers[worker].epoch, event=event)
                messages.append(pb.WatchResponse(blocks=[change], degraded=self.is_degraded))
        position = None if self.is_degraded else truth.position
        return [*messages, pb.WatchResponse(complete=True, position=position, degraded=self.is_degraded)]


Serve = Callable[..., Any]


@pytest.fixture
async def serve_kvstore() -> AsyncIterator[Serve]:
    async with AsyncExitStack() as stack:

        async def serve(kvstore: KvStoreReplica) -> Server:
            add = kvstore_service_pb2_grpc.add_KvStoreServiceServicer_to_server
            server = Server([Servicer(kvstore, add, "omni.kvstore.v1.KvStoreService")])
            kvstore.address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"
            stack.push_async_callback(server.stop, 0)
            stack.callback(kvstore.cut.set)
            return server

        yield serve


async def page_of(stack: Any) -> Any:
    return (await stack.client.get("/kv")).json()


async def until(stack: Any, condition: Callable[[Any], bool]) -> Any:
    """The summary page once it fulfils the condition."""
    async with asyncio.timeout(10):
        while not condition(page := await page_of(stack)):
            pass
    return page


async def until_at(stack: Any, truth: Truth) -> Any:
    want = {"dataset": truth.dataset, "event": len(truth.events)}
    return await until(stack, lambda page: page["position"] == want and page["age_s"] == 0)


def held(stack: Any) -> dict[tuple[str, int], dict[bytes, int]]:
    """Everything the proxy's copy has, as `Truth.held`."""
    found: dict[tuple[str, int], dict[bytes, int]] = {}
    index = stack.proxy.fleet.replica.index
    for member in index.members:
        for medium, keys, positions in index.held(member):
            found.setdefault((member, medium), {}).update(zip(split(keys), positions.tolist(), strict=True))
    return found


async def tiers(stack: Any, prompt: list[int] = PROMPT) -> dict[str, dict[str, int]]:
    page = (await stack.client.post("/kv/prefix", json={"prompt": prompt, "block_size": BLOCK})).json()
    return {
        worker: {
            t: n - before for t, before, n in zip(page["tiers"], [0, *reached], reached, strict=False) if n > before
        }
        for worker, reached in page["members"].items()
    }


async def fleet_of(start: Any, names: str) -> tuple[Truth, Any]:
    others = await start(names)
    truth = Truth()
    truth.tell(*(pb.WorkerChange(info=others[name].info()) for name in names.split()))
    return truth, others


async def test_a_snapshot_in_pages_then_deltas(start, serve_kvstore):
    truth, _ = await fleet_of(start, "p1 p2 d1")
    truth.tell(stored("p1", KEYS), stored("p2", KEYS[: 16 * 9]), stored("p2", KEYS[: 16 * 12], HOST))
    kvstore = KvStoreReplica(truth, page=2)
    await serve_kvstore(kvstore)
    stack = await start("", {"kvstore": kvstore.address})
    await until_at(stack, truth)
    assert held(stack) == truth.held()
    assert await tiers(stack) == {"p1": {"hbm": 14}, "p2": {"hbm": 9, "host": 3}, "d1": {}}
    assert (kvstore.requests[0].blocks, kvstore.requests[0].model) == (True, "tiny")
    assert not kvstore.requests[0].HasField("resume")

    truth.tell(removed("p1", KEYS[16 * 10 :]), cleared("p2"), stored("d1", KEYS[16 * 3 : 16 * 4], first=3))
    await until_at(stack, truth)
    assert held(stack) == truth.held()
    assert await tiers(stack) == {"p1": {"hbm": 10}, "p2": {}, "d1": {}}
    for action in ("stored", "removed", "cleared"):
        assert stack.metric("omni_proxy_prefix_deltas_total", action=action) == 1
    assert stack.metric("omni_proxy_prefix_snapshots_total") == 1


async def test_requests_follow_what_workers_report(start, serve_kvstore):
    truth, others = await fleet_of(start, "p1 p2 p3 d1")
    truth.tell(stored("p2", KEYS))
    kvstore = KvStoreReplica(truth)
    await serve_kvstore(kvstore)
    stack = await start("", {"kvstore": kvstore.address, "expected_ttl_s": 0.05})
    await until_at(stack, truth)
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4}
    assert (await stack.client.post("/v1/completions", json=body)).status_code == 200
    assert [name for name in ("p1", "p2", "p3") if others[name].prefills] == ["p2"]

    # What the engine never confirms is no longer expected after a while.
    other = PROMPT[::-1]
    assert (await stack.client.post("/v1/completions", json=body | {"prompt": other})).status_code == 200
    async with asyncio.timeout(5):
        while await tiers(stack, other) != {"p1": {}, "p2": {}, "p3": {}, "d1": {}}:
            pass
    chosen = [n for n in ("p1", "p2", "p3") if any(list(r.token_ids) == other for r in others[n].prefills)]
    truth.tell(stored(chosen[0], block_keys(other, BLOCK, root_key("tiny"))))
    await until_at(stack, truth)
    assert (await tiers(stack, other))[chosen[0]] == {"hbm": 14}
    assert held(stack) == truth.held()


async def test_a_new_epoch_starts_empty_and_late_words_of_the_old_one_are_ignored(start, serve_kvstore):
    truth, others = await fleet_of(start, "p1 d1")
    truth.tell(stored("p1", KEYS))
    kvstore = KvStoreReplica(truth)
    await serve_kvstore(kvstore)
    stack = await start("", {"kvstore": kvstore.address})
    await until_at(stack, truth)
    info = others["p1"].info()
    info.epoch = 2
    truth.tell(pb.WorkerChange(info=info), stored("p1", KEYS, epoch=1), stored("p1", KEYS[:32], epoch=2))
    await until_at(stack, truth)
    assert await tiers(stack) == {"p1": {"hbm": 2}, "d1": {}}
    assert stack.metric("omni_proxy_prefix_ignored_total") == 1
    truth.tell(pb.WorkerChange(info=info, removed=True))
    await until_at(stack, truth)
    assert held(stack) == {}


async def test_a_cut_watch_goes_on_from_its_position_at_another_replica(start, serve_kvstore):
    truth, _ = await fleet_of(start, "p1 d1")
    truth.tell(stored("p1", KEYS))
    first, second = KvStoreReplica(truth), KvStoreReplica(truth)
    server = await serve_kvstore(first)
    await serve_kvstore(second)
    stack = await start("", {"kvstore": f"{first.address},{second.address}"})
    await until_at(stack, truth)
    first.cut.set()
    await server.stop(0)
    truth.tell(removed("p1", KEYS[16:]), stored("d1", KEYS[:48]))
    page = await until_at(stack, truth)
    assert held(stack) == truth.held()
    assert (page["snapshots"], page["resumes"]) == (1, 1)
    assert second.requests[0].resume == pb.WatchPosition(dataset="a", event=3)
    assert stack.metric("omni_proxy_prefix_resumes_total") == 1


@pytest.mark.parametrize("lost", ["too far", "data"])
async def test_where_resuming_is_refused_a_snapshot_replaces_all(start, serve_kvstore, lost):
    truth, _ = await fleet_of(start, "p1 p2 d1")
    truth.tell(stored("p1", KEYS), stored("p2", KEYS))
    kvstore = KvStoreReplica(truth)
    server = await serve_kvstore(kvstore)
    stack = await start("", {"kvstore": kvstore.address})
    await until_at(stack, truth)
    kvstore.cut.set()
    await server.stop(0)
    truth.kept = 1
    if lost == "data":
        truth.dataset, truth.events, truth.blocks = "b", [], {}
    truth.tell(cleared("p2"), stored("p1", KEYS[:16], HOST))
    kvstore.cut = asyncio.Event()
    again = Server([Servicer(kvstore, kvstore_service_pb2_grpc.add_KvStoreServiceServicer_to_server, "kv")])
    await again.start(kvstore.address)
    try:
        page = await until_at(stack, truth)
        assert held(stack) == truth.held()
        assert (page["snapshots"], page["resumes"]) == (2, 0)
    finally:
        kvstore.cut.set()
        await again.stop(0)


async def test_a_late_a_cut_and_a_slow_proxy_end_alike(start, serve_kvstore):
    truth, others = await fleet_of(start, "p1 p2 d1")
    steady, weak, slow = KvStoreReplica(truth), KvStoreReplica(truth, page=3), KvStoreReplica(truth, lag=4)
    for kvstore in (steady, weak, slow):
        await serve_kvstore(kvstore)
    stacks = [await start("", {"kvstore": k.address}) for k in (steady, weak, slow)]
    for stack in stacks:
        await until_at(stack, truth)

    def bustle(seed: int, epoch: int = 1) -> None:
        tokens = [seed * 7 + i for i in range(70)]
        keys = block_keys([t % 300 for t in tokens], BLOCK, root_key("tiny"))
        truth.tell(stored("p1", keys, epoch=epoch), stored("p2", KEYS), stored("d1", keys, HOST))
        truth.tell(removed("p1", keys[16 * seed :], epoch=epoch), stored("p2", keys[:64]))
        if seed % 3 == 0:
            truth.tell(cleared("p2"), stored("p2", keys[16:32], first=1))

    slow.told.clear()
    weak.cut.set()
    await until(stacks[1], lambda page: page["age_s"] > 0)
    for seed in range(1, 6):
        bustle(seed)
    info = others["p1"].info()
    info.epoch = 2
    truth.tell(pb.WorkerChange(info=info), stored("p1", KEYS, epoch=2))
    weak.cut.clear()
    slow.told.set()
    for seed in range(6, 9):
        bustle(seed, epoch=2)
    late = await start("", {"kvstore": steady.address})
    pages = [await until_at(stack, truth) for stack in (*stacks, late)]
    assert [held(stack) for stack in (*stacks, late)] == [truth.held()] * 4
    assert [(page["snapshots"], page["resumes"]) for page in pages] == [(1, 0), (1, 1), (2, 0), (1, 0)]


async def test_a_snapshot_cut_in_the_middle_changes_nothing(start, serve_kvstore):
    truth, _ = await fleet_of(start, "p1 d1")
    truth.tell(stored("p1", KEYS))
    good, bad = KvStoreReplica(truth), KvStoreReplica(truth, page=1)
    await serve_kvstore(good)
    await serve_kvstore(bad)
    stack = await start("", {"kvstore": [good.address, bad.address]})
    await until_at(stack, truth)
    truth.kept, bad.pages_left = 0, 3
    good.told.clear()
    good.cut.set()
    truth.tell(removed("p1", KEYS[:16]))
    async with asyncio.timeout(5):
        while not bad.requests or bad.pages_left:
            assert await tiers(stack) == {"p1": {"hbm": 14}, "d1": {}}
    assert await tiers(stack) == {"p1": {"hbm": 14}, "d1": {}}
    bad.pages_left = None
    await until_at(stack, truth)
    assert held(stack) == truth.held()


async def test_while_the_kvstore_is_away_the_copy_ages_and_own_dispatches_count(start, serve_kvstore):
    truth, _ = await fleet_of(start, "p1 d1")
    truth.tell(stored("p1", KEYS[:64]))
    kvstore = KvStoreReplica(truth)
    server = await serve_kvstore(kvstore)
    stack = await start("", {"kvstore": kvstore.address, "expected_ttl_s": 0.05})
    await until_at(stack, truth)
    kvstore.cut.set()
    await server.stop(0)
    await until(stack, lambda page: (page["age_s"] or 0) > 0)
    assert await tiers(stack) == {"p1": {"hbm": 4}, "d1": {}}
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4}
    assert (await stack.client.post("/v1/completions", json=body)).status_code == 200
    assert await tiers(stack) == {"p1": {"hbm": 14}, "d1": {"hbm": 14}}
    ready = (await stack.client.get("/ready")).json()
    assert ready["parts"]["kvstore"]["state"] == "unreachable"
    assert ready["parts"]["kvstore"]["replica_age_s"] > 0
    await stack.client.get("/metrics")
    assert stack.metric("omni_proxy_prefix_age_seconds") > 0


async def test_degraded_is_said_and_its_changes_are_not_resumed(start, serve_kvstore):
    truth, _ = await fleet_of(start, "p1 d1")
    kvstore = KvStoreReplica(truth)
    await serve_kvstore(kvstore)
    stack = await start("", {"kvstore": kvstore.address})
    await until_at(stack, truth)
    kvstore.is_degraded = True
    truth.tell(stored("p1", KEYS))
    page = await until(stack, lambda page: page["degraded"])
    assert page["position"] is None
    assert await tiers(stack) == {"p1": {"hbm": 14}, "d1": {}}
    assert (await stack.client.get("/ready")).json()["parts"]["kvstore"]["state"] == "degraded"
    kvstore.is_degraded = False
    truth.tell(removed("p1", KEYS[:16]))
    page = await until_at(stack, truth)
    assert not page["degraded"]


async def test_pools_are_loaded_from_and_never_worked_on(start, serve_kvstore):
    truth, _ = await fleet_of(start, "p1 p2 d1")
    pool = engine_pb2.WorkerInfo(
        worker_id="pool", role=engine_pb2.ROLE_STORE, epoch=1, model="tiny", block_size=BLOCK,
        pool=engine_pb2.PoolCost(medium=kv_pb2.MEDIUM_REMOTE, latency_ms=2.0, ms_per_block=0.5),
    )  # fmt: skip
    truth.tell(pb.WorkerChange(info=pool), stored("pool", KEYS[: 16 * 10], kv_pb2.MEDIUM_REMOTE))
    truth.tell(stored("p2", KEYS[: 16 * 4], HOST))
    kvstore = KvStoreReplica(truth)
    await serve_kvstore(kvstore)
    stack = await start("", {"kvstore": kvstore.address, "host_ms_per_block": 0.25})
    page = await until_at(stack, truth)
    assert [m.worker.id for m in stack.proxy.fleet.members] == ["p1", "p2", "d1"]
    assert {m["id"]: m["pool"] for m in page["members"]}["pool"] == {"latency_ms": 2.0, "ms_per_block": 0.5}
    assert await tiers(stack) == {
        "p1": {"pool:pool": 10}, "p2": {"host": 4, "pool:pool": 6}, "d1": {"pool:pool": 10},
    }  # fmt: skip
    async with asyncio.timeout(5):
        while sum(m.refusal is None for m in stack.proxy.fleet.members) < 3:
            await stack.proxy.fleet.changed()
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4}
    assert (await stack.client.post("/v1/completions", json=body)).status_code == 200
    leg = next(s for s in stack.spans.get_finished_spans() if s.name == "proxy.prefill")
    # As many tokens could be loaded anywhere; for p2 that takes the least time.
    assert leg.attributes["omni.worker_id"] == "p2"
    assert leg.attributes["omni.predicted_cached_tokens"] == 0
    assert leg.attributes["omni.loadable_tokens"] == 10 * BLOCK
    assert leg.attributes["omni.load_ms"] == 4 * 0.25 + 2.0 + 6 * 0.5
    truth.tell(pb.WorkerChange(info=pool, removed=True))
    await until_at(stack, truth)
    assert (await tiers(stack))["d1"] == {}


async def test_a_pool_among_the_static_workers_is_ignored(start):
    others = await start("d1")
    others["d1"].role = engine_pb2.ROLE_STORE
    stack = await start("", {"workers": (others["d1"].address,)})
    async with asyncio.timeout(5):
        while not others["d1"].described:
            await stack.client.get("/health")
    assert stack.proxy.fleet.members == ()


async def test_static_workers_keep_what_was_seen_of_them_through_a_snapshot(start, serve_kvstore):
    truth, _ = await fleet_of(start, "p1")
    kvstore = KvStoreReplica(truth, lag=1)
    await serve_kvstore(kvstore)
    stack = await start("d1", {"kvstore": kvstore.address})
    await until_at(stack, truth)
    async with asyncio.timeout(5):
        while sum(m.refusal is None for m in stack.proxy.fleet.members) < 2:
            await stack.proxy.fleet.changed()
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4}
    assert (await stack.client.post("/v1/completions", json=body)).status_code == 200
    assert (await tiers(stack))["d1"] == {"hbm": 14}
    truth.tell(stored("p1", KEYS), removed("p1", KEYS[:16]), stored("p1", KEYS[:16]))
    page = await until(stack, lambda page: page["snapshots"] == 2)
    assert {m["id"]: m["reported"] for m in page["members"]} == {"p1": True, "d1": False}
    assert await tiers(stack) == {"p1": {"hbm": 14}, "d1": {"hbm": 14}}


async def test_what_cannot_be_is_left_behind_by_a_snapshot(start, serve_kvstore):
    truth, _ = await fleet_of(start, "p1 d1")
    kvstore = KvStoreReplica(truth)
    await serve_kvstore(kvstore)
    stack = await start("", {"kvstore": kvstore.address})
    await until_at(stack, truth)
    truth.events.append(stored("p1", KEYS, medium=kv_pb2.MEDIUM_UNSPECIFIED))
    truth.tell(stored("d1", KEYS[:16]))
    assert (await until_at(stack, truth))["snapshots"] == 1
    truth.events.append(stored("p1", KEYS[:15]))
    truth.tell(stored("p1", KEYS))
    page = await until_at(stack, truth)
    assert (page["snapshots"], page["resumes"]) == (2, 0)
    assert held(stack) == truth.held()


@pytest.mark.parametrize(
    ("given", "addresses"),
    [
        ("kvstore:50051", ("kvstore:50051",)),
        ("127.0.0.1:50051", ("127.0.0.1:50051",)),
        ("a:1,b:2, c:3", ("a:1", "b:2", "c:3")),
        ("[a:1, b:2]", ("a:1", "b:2")),
        ("", ()),
    ],
)
def test_the_setting_names_one_kvstore_or_several(tmp_path, given, addresses):
    environ = {"OMNI_PROXY_MODEL_DIR": str(tmp_path), "OMNI_PROXY_KVSTORE": given, "OMNI_PROXY_WORKERS": "w:1"}
    assert Settings.load(environ).kvstore == addresses
