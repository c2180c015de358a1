"""`omni kv` against real services: a kvstore over Redis, and workers that list what they hold."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from omni.engine.v1 import engine_pb2, worker_service_pb2
from omni.engine.v1.worker_service_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server
from omni.kvstore.v1 import kvstore_service_pb2 as pb
from omni.kvstore.v1.kvstore_service_pb2_grpc import KvStoreServiceStub
from omni_cli.main import app
from omni_common.blocks import KEY_BYTES, block_keys, root_key
from omni_common.rpc import Server, Servicer, channel

MODEL, BLOCK_SIZE, TOKENS = "m", 4, list(range(40))
KEYS = block_keys(TOKENS, BLOCK_SIZE, root_key(MODEL))
PREFIX = {
    "tokens": 40, "block_size": 4, "blocks": 10, "block_keys": KEYS.hex(), "tiers": ["hbm", "expected"],
    "members": {"right": [10, 10], "wrong": [4, 10]},
}  # fmt: skip
HOTTEST = {"prefixes": [{"block_key": "ab" * 16, "blocks": 7, "hits": 42, "members": ["right"]}]}


class _Worker(WorkerServiceServicer):
    def __init__(self, keys: bytes) -> None:
        self._keys = keys

    async def ListBlocks(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield worker_service_pb2.ListBlocksResponse(epoch=1, medium=1, block_keys=self._keys)


class _Cluster:
    """A kvstore and three workers: one is as published, one differs, one does not answer. Lives in a thread."""

    def __init__(self, folder: Path) -> None:
        self.address = ""
        self._folder, self._ready, self._loop = folder, threading.Event(), asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), daemon=True)
        self._thread.start()
        assert self._ready.wait(30)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(30)
        self._loop.close()

    async def _run(self) -> None:
        # The services are not dependencies of the command; the test environment has them.
        from omni_kvstore.app import running
        from omni_kvstore.settings import Settings

        settings = Settings.model_validate({"port": 0, "lease_s": 60.0, "embedded_redis_dir": self._folder})
        async with AsyncExitStack() as stack:
            kvstore = await stack.enter_async_context(running(settings, CollectorRegistry()))
            await kvstore.replica.answered_once.wait()
            self.address = f"127.0.0.1:{kvstore.port}"
            connected = await stack.enter_async_context(channel(self.address))
            stub: Any = KvStoreServiceStub(connected)  # type: ignore[no-untyped-call]
            held = {"right": KEYS, "wrong": KEYS[: 9 * KEY_BYTES] + b"x" * KEY_BYTES, "away": KEYS}
            for name, keys in held.items():
                port = 1 if name == "away" else await self._serve(stack, keys)
                await self._publish(stub, name, f"127.0.0.1:{port}")
            self._ready.set()
            await self._over.wait()

    async def _serve(self, stack: AsyncExitStack, keys: bytes) -> int:
        name = worker_service_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name
        server = Server([Servicer(_Worker(keys), add_WorkerServiceServicer_to_server, name)])
        stack.push_async_callback(server.stop, 0.0)
        return await server.start("127.0.0.1:0")

    async def _publish(self, stub: Any, name: str, address: str) -> None:
        info = engine_pb2.WorkerInfo(
            worker_id=name, address=address, epoch=1, model=MODEL, block_size=BLOCK_SIZE, num_blocks=50,
            role=engine_pb2.ROLE_BOTH,
        )  # fmt: skip
        call = stub.Register()
        await call.write(pb.RegisterRequest(info=info))
        await call.read()
        stored = pb.BlockEvent(
            action=pb.BLOCK_ACTION_STORED, medium=1, block_keys=KEYS, span=KEYS[:KEY_BYTES], positions=[0]
        )
        await stub.PublishBlocks(
            iter([pb.PublishBlocksRequest(worker_id=name, epoch=1, sequence=1, snapshot=True, events=[stored])])
        )


@pytest.fixture(scope="module")
def kvstore(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    cluster = _Cluster(tmp_path_factory.mktemp("redis"))
    yield cluster.address
    cluster.close()


@pytest.fixture
def proxy() -> Iterator[Any]:
    """The proxy's pages as a proxy serves them; `asked` keeps the bodies."""
    asked: list[Any] = []

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, HOTTEST if self.path.startswith("/kv/hottest") else {"model": MODEL})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append(body)
            if body.get("prompt") == "too long":
                self._answer(400, {"error": {"message": "the prompt is too long"}})
            else:
                self._answer(200, PREFIX)

        def _answer(self, status: int, content: object) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.asked = asked  # type: ignore[attr-defined]
    yield server
    server.shutdown()
    server.server_close()


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["kv", *arguments])


def _url(proxy: Any) -> str:
    return f"http://127.0.0.1:{proxy.server_address[1]}"


def test_workers(kvstore: str) -> None:
    answer = json.loads(_run("workers", "--kvstore", kvstore, "--json").output)
    assert not answer["degraded"]
    rows = {row["worker_id"]: row for row in answer["workers"]}
    assert set(rows) == {"right", "wrong", "away"}
    assert (rows["right"]["blocks"], rows["right"]["sequence"], rows["right"]["role"]) == (10, 1, "both")
    assert "10 of 50" in _run("workers", "--kvstore", kvstore).output


def test_verify_tells_missing_from_stale_from_silent(kvstore: str) -> None:
    result = _run("verify", "--kvstore", kvstore, "--settle-s", "0", "--json")
    assert result.exit_code == 3
    rows = {row["worker_id"]: row for row in json.loads(result.output)}
    assert rows["right"] == {
        "worker_id": "right", "held": 10, "stored": 10, "missing": 0, "stale": 0, "error": "", "agrees": True,
    }  # fmt: skip
    assert (rows["wrong"]["missing"], rows["wrong"]["stale"]) == (1, 1)
    assert rows["away"]["error"].startswith("UNAVAILABLE") and not rows["away"]["agrees"]
    assert _run("verify", "right", "--kvstore", kvstore).exit_code == 0
    assert "no worker 'nobody'" in str(_run("verify", "nobody", "--kvstore", kvstore).exception)


def test_prefix_shows_the_proxys_view_beside_the_stores(kvstore: str, proxy: Any) -> None:
    arguments = ("--url", _url(proxy), "--kvstore", kvstore)
    answer = json.loads(_run("prefix", "hello", *arguments, "--json").output)
    assert answer["proxy"]["members"] == PREFIX["members"]
    assert {(row["worker_id"], row["tier"], row["blocks"]) for row in answer["kvstore"]} == {
        (name, "hbm", 10) for name in ("right", "wrong", "away")
    }
    shown = _run("prefix", "hello", "--chat", *arguments).output
    assert "40 tokens, 10 whole blocks of 4" in shown and "expected" in shown
    assert proxy.asked == [{"prompt": "hello"}, {"messages": [{"role": "user", "content": "hello"}]}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(("prefix",), "give the prompt, or --file", id="no prompt"),
        pytest.param(("prefix", "too long"), "the prompt is too long", id="refused by the proxy"),
        pytest.param(("workers", "--kvstore", "127.0.0.1:1"), "kvstore at 127.0.0.1:1: UNAVAILABLE", id="no kvstore"),
    ],
)
def test_refusals_are_one_line(proxy: Any, arguments: tuple[str, ...], message: str) -> None:
    where = ("--url", _url(proxy)) if arguments[0] == "prefix" else ()
    result = _run(*arguments, *where)
    assert result.exit_code != 0 and message in str(result.exception)


def test_hottest(proxy: Any) -> None:
    shown = _run("hottest", "--url", _url(proxy)).output
    assert "42" in shown and "right" in shown
    assert json.loads(_run("hottest", "--url", _url(proxy), "--json").output) == HOTTEST
