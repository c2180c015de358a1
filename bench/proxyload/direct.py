"""The worker asked without a proxy: `python -m proxyload.direct < plan.json`; same marks and figures as the client.

As many closed loops as the client has streams, over one session. With a prefill worker in the plan each sequence is
prefilled there first, and its first token is the prefill's.
"""

import asyncio
import json
import sys
import time
from typing import Any

import grpc
import uvloop

from omni.decode.v1 import decode_service_pb2 as decode_pb
from omni.decode.v1 import decode_service_pb2_grpc
from omni.engine.v1 import engine_pb2
from omni.prefill.v1 import prefill_service_pb2 as prefill_pb
from omni.prefill.v1 import prefill_service_pb2_grpc
from omni_common.rpc import channel
from proxyload.client import Seen, result_of, say, thinking

_ACK_EVERY = 16


class Session:
    """One session and the loops on it."""

    def __init__(self, duties: dict[str, Any], seen: Seen) -> None:
        self._duties = duties
        self._seen = seen
        self._think = thinking(duties)
        self._decode = channel(duties["decode"])
        self._prefill = channel(duties["prefill"]) if duties.get("prefill") else None
        self._outbox: asyncio.Queue[decode_pb.SessionRequest] = asyncio.Queue()
        self._sent_s: dict[int, float] = {}
        self._last_s: dict[int, float] = {}
        self._next_id = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until cancelled."""
        stub: Any = decode_service_pb2_grpc.DecodeServiceStub(self._decode)  # type: ignore[no-untyped-call]
        call = stub.Session()
        await call.write(decode_pb.SessionRequest(hello=decode_pb.Hello(proxy_id="direct")))
        await call.read()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write(call))
            tasks.create_task(self._read(call))

    async def _write(self, call: Any) -> None:
        while True:
            await call.write(await self._outbox.get())

    async def _read(self, call: Any) -> None:
        for _ in range(self._duties["streams"]):
            self._begin()
        acked = 0
        while (message := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            self._on_frame(message.step)
            if message.step.frame - acked >= _ACK_EVERY:
                acked = message.step.frame
                self._outbox.put_nowait(decode_pb.SessionRequest(ack=decode_pb.Ack(frame=acked)))

    def _begin(self) -> None:
        self._next_id += 1
        task = asyncio.get_running_loop().create_task(self._start(self._next_id, self._think()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start(self, stream_id: int, think_s: float) -> None:
        await asyncio.sleep(think_s)
        self._sent_s[stream_id] = time.perf_counter()
        sampling = engine_pb2.Sampling(max_tokens=self._duties["max_tokens"])
        request_id, prompt = f"direct-{stream_id}", self._duties["prompt_ids"]
        submit = decode_pb.Submit(stream_id=stream_id, request_id=request_id, token_ids=prompt, sampling=sampling)
        if self._prefill is not None:
            stub: Any = prefill_service_pb2_grpc.PrefillServiceStub(self._prefill)  # type: ignore[no-untyped-call]
            order = prefill_pb.PrefillRequest(request_id=request_id, token_ids=prompt, sampling=sampling)
            answer = await stub.Prefill(order)
            self._note(stream_id, time.perf_counter())
            submit.token_ids.append(answer.first_token_id)
            submit.num_output_tokens = 1
            submit.sampling.max_tokens -= 1
            submit.kv_handle.CopyFrom(answer.kv_handle)
        self._outbox.put_nowait(decode_pb.SessionRequest(submit=submit))

    def _on_frame(self, frame: decode_pb.StepFrame) -> None:
        now = time.perf_counter()
        for stream_id in frame.stream_ids:
            self._note(stream_id, now)
        for finish in frame.finishes:
            del self._sent_s[finish.stream_id], self._last_s[finish.stream_id]
            self._seen.answers += 1
            self._begin()

    def _note(self, stream_id: int, now: float) -> None:
        seen, last_s = self._seen, self._last_s.get(stream_id)
        if seen.begin_s <= now <= seen.end_s:
            seen.events += 1
            if last_s is None:
                seen.ttft_ms.append((now - self._sent_s[stream_id]) * 1e3)
            else:
                seen.itl_ms.append((now - last_s) * 1e3)
        self._last_s[stream_id] = now


async def _run(duties: dict[str, Any]) -> dict[str, Any]:
    seen = Seen()
    running = asyncio.create_task(Session(duties, seen).run())
    await asyncio.wait({running}, timeout=duties["warm_s"])
    say({"mark": "begin"})
    cpu_s, seen.begin_s = time.process_time(), time.perf_counter()
    await asyncio.wait({running}, timeout=duties["measure_s"])
    seen.end_s = time.perf_counter()
    cpu_s = time.process_time() - cpu_s
    say({"mark": "end"})
    if running.done():
        running.result()
        return {"error": "the worker ended the session"}
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return result_of(seen, cpu_s)


def main() -> None:
    duties = json.load(sys.stdin)
    try:
        result = uvloop.run(_run(duties))
    except (grpc.aio.AioRpcError, OSError) as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    say(result)


if __name__ == "__main__":
    main()
