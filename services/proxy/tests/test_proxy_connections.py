"""Clients that misuse their connection: nobody else pays, and who only writes unusual HTTP is served."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from omni_proxy.connections import MAX_AHEAD, MAX_HEAD_BYTES, Connection

PATIENCE_S = 0.1


class Echo:
    """Answers with the body; `/wait` holds the answer until `released`, `/blind` answers without reading."""

    def __init__(self) -> None:
        self.seen = 0
        self.released = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen += 1
        body, more = b"", scope["path"] != "/blind"
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if scope["path"] == "/wait":
            await self.released.wait()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Any]


@asynccontextmanager
async def serving(app: Echo, patience_s: float = PATIENCE_S) -> AsyncIterator[Connect]:
    config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False)  # type: ignore[arg-type]
    config.load()
    state = ServerState()

    def connection() -> Connection:
        return Connection(config=config, server_state=state, app_state={}, patience_s=patience_s)

    server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", 0)
    port, writers = server.sockets[0].getsockname()[1], list[asyncio.StreamWriter]()

    async def connect() -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writers.append(writer)
        return reader, writer

    try:
        yield connect
    finally:
        for writer in writers:
            writer.close()
        server.close()
        await asyncio.gather(*state.tasks)


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return int(head.split()[1]), await reader.readexactly(int(lengths[0].split(b":")[1]))


def post(path: str = "/", body: bytes = b"hello", *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


@pytest.mark.parametrize("parts", [1, 2, 90])
async def test_an_offer_to_upgrade_loses_neither_body_nor_connection(parts):
    async with serving(Echo(), patience_s=10) as connect:
        reader, writer = await connect()
        raw = post("/", b"hello", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
        size = -(-len(raw) // parts)
        for start in range(0, len(raw), size):
            writer.write(raw[start : start + size])
            await writer.drain()
        assert await answer(reader) == (200, b"hello")
        writer.write(post("/", b"again"))
        assert await answer(reader) == (200, b"again")


@pytest.mark.parametrize(
    "begun", [b"", b"POST / HTTP/1.1\r\nHost: x\r\nX-", b"GET"], ids=["nothing", "half a head", "a word"]
)
async def test_who_sends_no_whole_head_is_left(begun):
    app = Echo()
    async with serving(app) as connect:
        reader, writer = await connect()
        writer.write(begun)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
    assert app.seen == 0


@pytest.mark.parametrize("begun", [b"POST / HT", b"\r\n"], ids=["half a head", "an empty line"])
async def test_a_next_head_has_its_time_too(begun):
    async with serving(Echo()) as connect:
        reader, writer = await connect()
        writer.write(post())
        assert await answer(reader) == (200, b"hello")
        writer.write(begun)
        async with asyncio.timeout(5):
            assert await reader.read() == b""


async def test_a_running_answer_outlasts_the_time_for_the_next_head():
    app = Echo()
    async with serving(app, patience_s=0.01) as connect:
        reader, writer = await connect()
        writer.write(post("/wait") + b"POST / HT")
        other, _ = await connect()
        assert await other.read() == b""  # its patience has passed meanwhile
        app.released.set()
        assert await answer(reader) == (200, b"hello")


async def test_a_body_that_never_ends_is_left_after_its_answer():
    async with serving(Echo()) as connect:
        reader, writer = await connect()
        writer.write(b"POST /blind HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nx")
        assert await answer(reader) == (200, b"")
        async with asyncio.timeout(5):
            assert await reader.read() == b""


async def sent_until(told: "asyncio.Task[Any]", writer: asyncio.StreamWriter, piece: bytes) -> None:
    """Keeps sending until the other side has said something, or has ended the connection."""
    while not told.done():
        writer.write(piece * 64)
        try:
            await asyncio.wait_for(writer.drain(), 5)
        except ConnectionError:
            break
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"POST / HTTP/1.1\r\nHost: x\r\n", b"X-A: " + b"v" * 995 + b"\r\n"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nX-A: ", b"v" * 1000),
        (b"POST /", b"v" * 1000),
    ],
    ids=["headers", "one header", "path"],
)
async def test_a_head_without_end_is_refused_and_its_sender_told(head, piece):
    app = Echo()
    async with serving(app, patience_s=10) as connect:
        reader, writer = await connect()
        writer.write(head)
        told = asyncio.create_task(answer(reader))
        await sent_until(told, writer, piece)
        status, body = await told
        assert (status, json.loads(body)["error"]["code"]) == (431, "bad_http")
    assert app.seen == 0


async def test_a_trailer_without_end_ends_the_connection():
    async with serving(Echo(), patience_s=10) as connect:
        reader, writer = await connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-A: ")
        ended = asyncio.create_task(reader.read())
        await sent_until(ended, writer, b"v" * 1000)
        said = await asyncio.gather(ended, return_exceptions=True)
        assert said == [b""] or isinstance(said[0], ConnectionError)


async def test_a_head_as_long_as_allowed_is_read():
    async with serving(Echo(), patience_s=10) as connect:
        reader, writer = await connect()
        writer.write(post("/", b"hello", "X-A: " + "v" * (MAX_HEAD_BYTES - 1000)))
        assert await answer(reader) == (200, b"hello")


async def test_a_body_may_be_longer_than_a_head():
    async with serving(Echo(), patience_s=10) as connect:
        reader, writer = await connect()
        writer.write(post("/", b"x" * 20 * MAX_HEAD_BYTES))
        assert await answer(reader) == (200, b"x" * 20 * MAX_HEAD_BYTES)


async def test_requests_ahead_of_their_answers_are_answered_in_order():
    async with serving(Echo(), patience_s=10) as connect:
        reader, writer = await connect()
        writer.write(b"".join(post("/", b"%d" % i) for i in range(MAX_AHEAD)))
        assert [await answer(reader) for _ in range(MAX_AHEAD)] == [(200, b"%d" % i) for i in range(MAX_AHEAD)]


async def test_too_many_requests_ahead_end_the_connection():
    app = Echo()
    async with serving(app, patience_s=10) as connect:
        reader, writer = await connect()
        writer.write(post("/wait") * (MAX_AHEAD + 2))
        async with asyncio.timeout(5):
            said = await asyncio.gather(reader.read(), return_exceptions=True)
        assert said == [b""] or isinstance(said[0], ConnectionError)
        assert app.seen == 1
        app.released.set()


async def test_what_is_not_http_is_told_so():
    async with serving(Echo(), patience_s=10) as connect:
        reader, writer = await connect()
        writer.write(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        status, body = await answer(reader)
        assert (status, json.loads(body)["error"]["message"]) == (400, "this is not HTTP")
