"""The thinnest relay in the proxy's stack: `python -m proxyload.relay PORT < plan.json`.

What no proxy in Python can leave out: the same HTTP server, chat template, tokenizer, gRPC client and detokenizer, and
one event per token. It does not schedule, hold, trace, count, try again, abort, match stop strings, check a request or
wait for slow clients.
"""

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import orjson
import uvicorn
import uvloop

from omni.decode.v1 import decode_service_pb2 as decode_pb
from omni.decode.v1 import decode_service_pb2_grpc
from omni.engine.v1 import engine_pb2
from omni.prefill.v1 import prefill_service_pb2 as prefill_pb
from omni.prefill.v1 import prefill_service_pb2_grpc
from omni_common.rpc import channel
from omni_proxy.detokenize import Detokenizer
from omni_proxy.eager_send import EagerSend
from omni_proxy.text import ModelText

_ACK_EVERY = 16
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8")]
_PREFIX = b'data: {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":'
_SUFFIX = b'},"finish_reason":null}]}\n\n'
_END = b'data: {"choices":[],"usage":{"completion_tokens":%d}}\n\ndata: [DONE]\n\n'


@dataclass(slots=True)
class Answer:
    """One stream to a client; text is written in the callback that brought its token."""

    send: EagerSend
    detokenizer: Detokenizer
    tokens: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def show(self, token_id: int) -> None:
        if not self.tokens:
            self.send.at_once({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        self.tokens += 1
        body = b"".join((_PREFIX, orjson.dumps(self.detokenizer.push((token_id,))), _SUFFIX))
        self.send.at_once({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        await self.send({"type": "http.response.body", "body": _END % self.tokens, "more_body": False})


class Relay:
    """The application, and its one session with the worker that decodes."""

    def __init__(self, plan: Mapping[str, Any]) -> None:
        self._text = ModelText(Path(plan["model_dir"]))
        self._decode = channel(plan["decode"])
        self._prefill: Any = None
        if plan["prefill"]:
            self._prefill = prefill_service_pb2_grpc.PrefillServiceStub(channel(plan["prefill"]))  # type: ignore[no-untyped-call]
        self._answers: dict[int, Answer] = {}
        self._next_id = 0
        self._call: Any = None
        self._writing = asyncio.Lock()

    async def run(self) -> None:
        """The session, until the worker ends it."""
        stub: Any = decode_service_pb2_grpc.DecodeServiceStub(self._decode)  # type: ignore[no-untyped-call]
        call, acked = stub.Session(), 0
        await call.write(decode_pb.SessionRequest(hello=decode_pb.Hello(proxy_id="relay")))
        await call.read()
        self._call = call
        while (message := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            frame = message.step
            for stream_id, token_id in zip(frame.stream_ids, frame.token_ids, strict=True):
                self._answers[stream_id].show(token_id)
            for finish in frame.finishes:
                self._answers.pop(finish.stream_id).ended.set()
            if frame.frame - acked >= _ACK_EVERY:
                acked = frame.frame
                await self._write(decode_pb.SessionRequest(ack=decode_pb.Ack(frame=acked)))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "GET":
            await send({"type": "http.response.start", "status": 200 if self._call else 503, "headers": []})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        parts, message = [], {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            parts.append(message["body"])
        body = orjson.loads(b"".join(parts))
        answer = Answer(EagerSend(send), self._text.detokenizer(skip_special_tokens=True))
        rendered = self._text.render(body["messages"], add_generation_prompt=True)
        prompt = await self._text.encode(rendered, add_special_tokens=False)
        await self._start(answer, prompt, body["max_tokens"])
        await answer.ended.wait()
        await answer.end()

    async def _start(self, answer: Answer, prompt: list[int], max_tokens: int) -> None:
        self._next_id += 1
        stream_id, request_id = self._next_id, f"relay-{self._next_id}"
        sampling = engine_pb2.Sampling(max_tokens=max_tokens, ignore_eos=True)
        submit = decode_pb.Submit(stream_id=stream_id, request_id=request_id, token_ids=prompt, sampling=sampling)
        if self._prefill is not None:
            order = prefill_pb.PrefillRequest(request_id=request_id, token_ids=prompt, sampling=sampling)
            first = await self._prefill.Prefill(order)
            answer.show(first.first_token_id)
            if max_tokens == 1:
                answer.ended.set()
                return
            submit.token_ids.append(first.first_token_id)
            submit.num_output_tokens = 1
            submit.sampling.max_tokens -= 1
            submit.kv_handle.CopyFrom(first.kv_handle)
        self._answers[stream_id] = answer
        await self._write(decode_pb.SessionRequest(submit=submit))

    async def _write(self, message: decode_pb.SessionRequest) -> None:
        async with self._writing:
            await self._call.write(message)


async def _serve(plan: Mapping[str, Any], port: int) -> None:
    relay = Relay(plan)
    config = uvicorn.Config(
        relay, port=port, loop="uvloop", http="httptools", ws="none", lifespan="off", access_log=False,
        log_config=None, server_header=False, proxy_headers=False, timeout_keep_alive=75,
    )  # fmt: skip
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(relay.run())
        tasks.create_task(uvicorn.Server(config).serve())


def main() -> None:
    uvloop.run(_serve(json.load(sys.stdin), int(sys.argv[1])))


if __name__ == "__main__":
    main()
