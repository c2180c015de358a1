"""Servers that do less than the proxy, as a scale: `python -m proxyload.reference KIND PORT < plan.json`.

Both answer every request with the events that the proxy sends, one write per event and per turn of the event loop, as
fast as they can; there is no worker, no detokenizer and no stop string.

asgi      a raw ASGI application under the proxy's own HTTP server and settings: a task per stream, one `send` per event
protocol  an asyncio.Protocol: one callback per turn writes a ready chunk to every connection
"""

import asyncio
import itertools
import json
import sys
from typing import Any, cast

import uvicorn
import uvloop

_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def events_of(plan: dict[str, Any]) -> tuple[list[bytes], bytes]:
    """One event per token, and the end of the answer."""
    prefix = (
        'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk",'
        f'"created":1700000000,"model":"{plan["model"]}","choices":[{{"index":0,"delta":{{"content":'
    )
    suffix = '},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
    events = [f"{prefix}{json.dumps(text, ensure_ascii=False)}{suffix}".encode() for text in plan["texts"]]
    return events, f'data: {{"choices":[],"usage":{{"completion_tokens":{len(events)}}}}}\n\ndata: [DONE]\n\n'.encode()


class Application:
    """`/ready` and a stream for every POST."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._events, self._end = events_of(plan)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        kind = b"application/json" if scope["method"] == "GET" else b"text/event-stream; charset=utf-8"
        if scope["method"] == "POST":
            while (await receive()).get("more_body"):
                pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        if scope["method"] == "POST":
            for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": self._end, "more_body": False})


class Bare(asyncio.Protocol):
    """Reads requests that arrive whole; `active` are the connections with an answer under way."""

    def __init__(self, plan: dict[str, Any], active: "dict[Bare, Any]") -> None:
        events, end = events_of(plan)
        self._chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in events]
        self._end = b"%x\r\n%b\r\n0\r\n\r\n" % (len(end), end)
        self._active = active
        self._transport: asyncio.Transport | None = None
        self._is_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._active.pop(self, None)

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        if data.startswith(b"GET"):
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            return
        self._transport.write(_HEAD)
        self._active[self] = itertools.chain(self._chunks, [self._end])

    def turn(self) -> None:
        if self._is_paused or self._transport is None:
            return
        if (chunk := next(self._active[self], None)) is None:
            del self._active[self]
        else:
            self._transport.write(chunk)


async def _bare(plan: dict[str, Any], port: int) -> None:
    active: dict[Bare, Any] = {}
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: Bare(plan, active), "127.0.0.1", port, backlog=2048)
    while True:
        for connection in list(active):
            connection.turn()
        await asyncio.sleep(0 if active else 0.001)


def main() -> None:
    kind, port = sys.argv[1], int(sys.argv[2])
    plan = json.load(sys.stdin)
    if kind == "protocol":
        uvloop.run(_bare(plan, port))
        return
    config = uvicorn.Config(
        Application(plan), port=port, loop="uvloop", http="httptools", ws="none", lifespan="off", backlog=2048,
        access_log=False, log_config=None, server_header=False,
    )  # fmt: skip
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
