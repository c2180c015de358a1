"""A simulated worker that costs little: `python -m proxyload.worker ROLE PORT MODEL STEP_MS < tokens.json`.

It speaks the real contracts over the real gRPC server and computes nothing. A sequence's token k is entry k of a fixed
list, so that a client knows the text to expect. The first token of a sequence leaves at once; later ones leave in step
frames of all running sequences, every STEP_MS milliseconds, or with 0 as fast as the proxy acknowledges frames.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvloop

from omni.decode.v1 import decode_service_pb2 as decode_pb
from omni.decode.v1 import decode_service_pb2_grpc
from omni.engine.v1 import engine_pb2, worker_service_pb2, worker_service_pb2_grpc
from omni.kv.v1 import kv_pb2
from omni.prefill.v1 import prefill_service_pb2 as prefill_pb
from omni.prefill.v1 import prefill_service_pb2_grpc
from omni_common.rpc import Server, Servicer

# As many frames as a decode worker sends ahead by default.
FRAME_WINDOW = 64
_ROLES = {"prefill": engine_pb2.ROLE_PREFILL, "decode": engine_pb2.ROLE_DECODE, "both": engine_pb2.ROLE_BOTH}


class Running:
    """The sequences of one session: tokens produced and to produce, by stream id."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._produced: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._fresh: list[int] = []
        self.acked = 0
        self.wake = asyncio.Event()

    def receive(self, message: decode_pb.SessionRequest) -> None:
        match message.WhichOneof("message"):
            case "submit":
                submit = message.submit
                self._fresh.append(submit.stream_id)
                self._produced[submit.stream_id] = submit.num_output_tokens
                self._ends[submit.stream_id] = submit.num_output_tokens + submit.sampling.max_tokens
            case "abort":
                for stream_id in message.abort.stream_ids:
                    self._produced.pop(stream_id, None)
            case "ack":
                self.acked = message.ack.frame
        self.wake.set()

    @property
    def has_any(self) -> bool:
        return bool(self._produced)

    @property
    def has_fresh(self) -> bool:
        return bool(self._fresh)

    def first_tokens(self, frame: int) -> decode_pb.SessionResponse:
        """The first token of sequences that have none yet."""
        fresh = [stream_id for stream_id in self._fresh if stream_id in self._produced]
        self._fresh.clear()
        starts = [decode_pb.SequenceStart(stream_id=stream_id) for stream_id in fresh]
        return self._frame(frame, fresh, starts)

    def step(self, frame: int) -> decode_pb.SessionResponse:
        """One token of every running sequence."""
        return self._frame(frame, list(self._produced), ())

    def _frame(self, frame: int, stream_ids: list[int], starts: Any) -> decode_pb.SessionResponse:
        tokens, produced, ends = self._tokens, self._produced, self._ends
        token_ids, finishes = [], []
        for stream_id in stream_ids:
            position = produced[stream_id]
            token_ids.append(tokens[position % len(tokens)])
            produced[stream_id] = position + 1
            if position + 1 >= ends[stream_id]:
                del produced[stream_id], ends[stream_id]
                reason = engine_pb2.FINISH_REASON_LENGTH
                finishes.append(decode_pb.SequenceFinish(stream_id=stream_id, reason=reason))
        step = decode_pb.StepFrame(
            frame=frame, stream_ids=stream_ids, token_ids=token_ids, starts=starts, finishes=finishes
        )
        return decode_pb.SessionResponse(step=step)


class SimulatedWorker(
    worker_service_pb2_grpc.WorkerServiceServicer,
    decode_service_pb2_grpc.DecodeServiceServicer,
    prefill_service_pb2_grpc.PrefillServiceServicer,
):
    """All services of one worker."""

    def __init__(self, role: str, model: str, tokens: list[int], step_s: float) -> None:
        self._info = engine_pb2.WorkerInfo(
            worker_id=f"simulated-{role}", role=_ROLES[role], epoch=1, model=model, block_size=16, num_blocks=1 << 20,
            max_model_len=4096, max_num_seqs=4096, max_num_batched_tokens=8192, engine="simulated",
            kv_connector="simulated", engine_id=role,
        )  # fmt: skip
        self._tokens = tokens
        self._step_s = step_s

    async def Describe(self, request: Any, context: Any) -> worker_service_pb2.DescribeResponse:
        return worker_service_pb2.DescribeResponse(info=self._info)

    async def WatchStats(self, request: Any, context: Any) -> AsyncIterator[worker_service_pb2.WatchStatsResponse]:
        while True:
            yield worker_service_pb2.WatchStatsResponse(worker_id=self._info.worker_id, epoch=1)
            await asyncio.sleep(max(1, request.min_interval_ms) / 1e3)

    async def Prefill(self, request: prefill_pb.PrefillRequest, context: Any) -> prefill_pb.PrefillResponse:
        handle = kv_pb2.KvHandle(
            opaque=b"x", engine_id="prefill", lease_id=request.request_id, num_tokens=len(request.token_ids),
            num_blocks=1, lease_s=30, block_size=16,
        )  # fmt: skip
        return prefill_pb.PrefillResponse(
            first_token_id=self._tokens[0], worker_id=self._info.worker_id, epoch=1, kv_handle=handle
        )

    async def ReleaseKv(self, request: Any, context: Any) -> prefill_pb.ReleaseKvResponse:
        return prefill_pb.ReleaseKvResponse(released=True)

    async def Session(self, requests: Any, context: Any) -> AsyncIterator[decode_pb.SessionResponse]:
        await anext(requests)
        welcome = decode_pb.Welcome(worker_id=self._info.worker_id, epoch=1, frame_window=FRAME_WINDOW)
        yield decode_pb.SessionResponse(welcome=welcome)
        running = Running(self._tokens)
        reader = asyncio.create_task(_read(requests, running))
        try:
            async for response in self._frames(running):
                yield response
        finally:
            reader.cancel()

    async def _frames(self, running: Running) -> AsyncIterator[decode_pb.SessionResponse]:
        loop = asyncio.get_running_loop()
        frame, due_s = 0, loop.time()
        while True:
            running.wake.clear()
            if not running.has_any or frame - running.acked >= FRAME_WINDOW:
                await running.wake.wait()
            elif running.has_fresh:
                frame += 1
                yield running.first_tokens(frame)
            elif (early_s := due_s - loop.time()) > 0:
                timer = loop.call_later(early_s, running.wake.set)
                await running.wake.wait()
                timer.cancel()
            else:
                frame += 1
                due_s = max(due_s + self._step_s, loop.time())
                yield running.step(frame)
                # A yield alone need not let the reader run.
                await asyncio.sleep(0)


async def _read(requests: Any, running: Running) -> None:
    async for message in requests:
        running.receive(message)


async def _serve(role: str, port: int, model: str, step_s: float) -> None:
    worker = SimulatedWorker(role, model, json.load(sys.stdin), step_s)
    servicers = [
        Servicer(worker, worker_service_pb2_grpc.add_WorkerServiceServicer_to_server, "omni.engine.v1.WorkerService")
    ]
    if role != "decode":
        add = prefill_service_pb2_grpc.add_PrefillServiceServicer_to_server
        servicers.append(Servicer(worker, add, "omni.prefill.v1.PrefillService"))
    if role != "prefill":
        add = decode_service_pb2_grpc.add_DecodeServiceServicer_to_server
        servicers.append(Servicer(worker, add, "omni.decode.v1.DecodeService"))
    server = Server(servicers)
    await server.start(f"127.0.0.1:{port}")
    await asyncio.Event().wait()


def main() -> None:
    role, port, model, step_ms = sys.argv[1:]
    uvloop.run(_serve(role, int(port), model, float(step_ms) / 1e3))


if __name__ == "__main__":
    main()
