"""The prefix index beside real engines: what it promises of a prompt is what the engine then finds in its cache.

Two engines that do both legs, with caches too small for the documents the prompts are cut from, so that blocks are
evicted all the while. Before each prompt proxy and kvstore say what each worker holds of it; the engine's own
count of cached tokens is the judge. Then engine, kvstore and Redis are killed: nothing they forgot may be promised.
"""

import os
import random
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import psutil
import pytest
import redis
from live import LiveStack, eventually, live_stack

from omni.engine.v1 import worker_service_pb2 as worker_pb
from omni.engine.v1.worker_service_pb2_grpc import WorkerServiceStub
from omni.kvstore.v1 import kvstore_service_pb2 as kvstore_pb
from omni.kvstore.v1.kvstore_service_pb2_grpc import KvStoreServiceStub

pytestmark = [pytest.mark.engine, pytest.mark.stack, pytest.mark.timeout(900)]

ENGINES = ("decode-0", "decode-1")
SMALL = ("--prefill", "0", "--decode", "2", "--kv-cache-gib", "0.015", "--max-model-len", "3072")
ENVIRON = {"OMNI_DECODE_EVENTS_INTERVAL_S": "0.02"}
DOCUMENTS, DOCUMENT_TOKENS, VOCABULARY = 6, 2000, 1500
PROMPTS, PROMPTS_AFTER_A_KILL = 200, 20
SETTLE_TIMEOUT_S = 20.0
RELOAD_TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True)
class Promise:
    """One prompt: blocks promised of the worker that served it, by the proxy and by the kvstore, and blocks it had."""

    proxy: int
    kvstore: int
    found: int


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    with live_stack(tmp_path_factory.mktemp("pair"), *SMALL, environ=ENVIRON) as running:
        yield running


class Prompts:
    """Beginnings of a few documents, mostly with an ending of their own."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._documents = [self._tokens(DOCUMENT_TOKENS) for _ in range(DOCUMENTS)]

    def next(self) -> list[int]:
        start = self._random.choice(self._documents)[: self._random.randrange(1, DOCUMENT_TOKENS)]
        return start + self._tokens(self._random.choice((0, 0, 10, 150)))

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(VOCABULARY) for _ in range(count)]


def blocks(stub: Any, request: Any) -> set[tuple[int, bytes]]:
    return {
        (page.medium, page.block_keys[i : i + 16])
        for page in stub.ListBlocks(request, timeout=10)
        for i in range(0, len(page.block_keys), 16)
    }


def is_right(stack: LiveStack) -> bool:
    """Redis holds exactly what every engine's mirror holds, and the proxy has heard all of it."""
    records = stack.processes()
    try:
        with grpc.insecure_channel(records["kvstore"]["address"]) as store:
            kvstore: Any = KvStoreServiceStub(store)  # type: ignore[no-untyped-call]
            for name in ENGINES:
                with grpc.insecure_channel(records[name]["address"]) as engine:
                    worker: Any = WorkerServiceStub(engine)  # type: ignore[no-untyped-call]
                    held = blocks(worker, worker_pb.ListBlocksRequest())
                if held != blocks(kvstore, kvstore_pb.ListBlocksRequest(worker_id=f"{stack.name}-{name}")):
                    return False
            watch = kvstore.Watch(kvstore_pb.WatchRequest(), timeout=10)
            position = next(message.position for message in watch if message.complete and not message.degraded)
            watch.cancel()
    except grpc.RpcError:
        return False
    with stack.client() as http:
        seen = http.get("/kv").json()["position"]
    return bool(seen and seen["dataset"] == position.dataset and seen["event"] >= position.event)


def promised(stack: LiveStack, http: httpx.Client, prompt: Sequence[int]) -> tuple[int, dict[str, int], dict[str, int]]:
    """Block size, and blocks of the prompt each worker holds, as the proxy and as the kvstore have it."""
    page = http.post("/kv/prefix", json={"prompt": prompt}).raise_for_status().json()
    hbm = page["tiers"].index("hbm")
    with grpc.insecure_channel(stack.processes()["kvstore"]["address"]) as store:
        kvstore: Any = KvStoreServiceStub(store)  # type: ignore[no-untyped-call]
        request = kvstore_pb.LookupRequest(
            model=stack.model, block_size=page["block_size"], block_keys=bytes.fromhex(page["block_keys"])
        )
        matches = kvstore.Lookup(request, timeout=10).matches
    stored = {match.worker_id: match.num_blocks for match in matches}
    return page["block_size"], {worker: depths[hbm] for worker, depths in page["members"].items()}, stored


def dispatched(http: httpx.Client) -> Counter[str]:
    workers = http.get("/workers").raise_for_status().json()["workers"]
    return Counter({worker["id"]: worker["in_flight"]["dispatched"] for worker in workers})


def ask(stack: LiveStack, http: httpx.Client, prompt: Sequence[int]) -> Promise:
    size, proxy, stored = promised(stack, http, prompt)
    before = dispatched(http)
    body = {"model": stack.model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    usage = http.post("/v1/completions", json=body).raise_for_status().json()["usage"]
    [(worker, _)] = (dispatched(http) - before).items()
    # An engine computes at least the last token of a prompt, so a block that ends with it is never found.
    most = (len(prompt) - 1) // size
    found = usage["prompt_tokens_details"]["cached_tokens"] // size
    return Promise(min(proxy.get(worker, 0), most), min(stored.get(worker, 0), most), found)


def report(what: str, promises: Sequence[Promise]) -> None:
    for side in ("proxy", "kvstore"):
        off = Counter(getattr(promise, side) - promise.found for promise in promises)
        hits = sum(promise.found > 0 for promise in promises)
        print(f"\n{what}: {side} exact {off[0]} of {len(promises)} ({hits} with hits), off by blocks: {dict(off)}")


def test_the_index_promises_what_engines_find(pair: LiveStack) -> None:
    prompts, promises = Prompts(1), list[Promise]()
    with pair.client() as http:
        for _ in range(40):
            ask(pair, http, prompts.next())
        for _ in range(PROMPTS):
            eventually("the index is right", lambda: is_right(pair), SETTLE_TIMEOUT_S)
            promises.append(ask(pair, http, prompts.next()))
    report("settled", promises)
    assert any(promise.found for promise in promises), "nothing was ever cached: the test shows nothing"
    assert all(promise.proxy == promise.kvstore == promise.found for promise in promises)


@pytest.mark.parametrize("part", ["decode-0", "kvstore", "redis", "redis without its data"])
def test_nothing_forgotten_is_promised(pair: LiveStack, part: str) -> None:
    prompts, promises = Prompts(2), list[Promise]()
    with pair.client() as http:
        for _ in range(30):
            ask(pair, http, prompts.next())
        eventually("the index is right", lambda: is_right(pair), SETTLE_TIMEOUT_S)
        victim = kill(pair, part)
        eventually(f"{part} is back", lambda: is_back(pair, part, victim), RELOAD_TIMEOUT_S)
        # The first comes before anything was told again, those after it when what it evicted is known to be gone.
        for _ in range(PROMPTS_AFTER_A_KILL):
            promises.append(ask(pair, http, prompts.next()))
            eventually("the index is right again", lambda: is_right(pair), SETTLE_TIMEOUT_S)
        settled = [ask(pair, http, prompts.next())]
    report(f"after the death of {part}", promises)
    assert all(promise.proxy <= promise.found and promise.kvstore <= promise.found for promise in promises)
    assert all(promise.proxy == promise.kvstore == promise.found for promise in settled)


def test_the_command_line_agrees(pair: LiveStack) -> None:
    eventually("the index is right", lambda: is_right(pair), SETTLE_TIMEOUT_S)
    home = ("--name", pair.name)
    verified = pair.omni("kv", "verify")
    assert verified.stdout.count("right") == len(ENGINES), home
    assert all(f"{pair.name}-{name}" in pair.omni("kv", "workers").stdout for name in ENGINES)
    assert "blocks of" in pair.omni("kv", "prefix", "Once upon a time " * 100).stdout
    assert pair.omni("kv", "hottest").returncode == 0


def redis_process(stack: LiveStack) -> psutil.Process:
    children = psutil.Process(stack.pid("kvstore")).children(recursive=True)
    return next(child for child in children if "redis-server" in child.name())


def kill(stack: LiveStack, part: str) -> int:
    if not part.startswith("redis"):
        return stack.kill(part)
    process = redis_process(stack)
    if part == "redis without its data":
        port = next(c.laddr.port for c in process.net_connections() if c.status == psutil.CONN_LISTEN)
        with redis.Redis(port=port) as client:
            client.flushall()
    os.kill(process.pid, signal.SIGKILL)
    return process.pid


def is_back(stack: LiveStack, part: str, victim: int) -> bool:
    if part.startswith("redis"):
        try:
            is_new = redis_process(stack).pid != victim
        except (StopIteration, psutil.NoSuchProcess):
            return False
    else:
        is_new = stack.pid(part) != victim and stack.is_serving(part)
    if not is_new or not stack.is_serving("kvstore"):
        return False
    with stack.client() as http:
        return all(worker["takes_work"] for worker in http.get("/workers").json()["workers"])
