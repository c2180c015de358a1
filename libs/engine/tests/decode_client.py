"""A proxy's end of a decode session, for tests."""

import asyncio
from contextlib import asynccontextmanager

from omni.decode.v1 import decode_service_pb2 as wire
from omni.decode.v1.decode_service_pb2_grpc import DecodeServiceStub
from omni.engine.v1 import engine_pb2

PROMPT = list(range(100, 170))


class Client:
    """A proxy's end of one session; collects what every sequence was sent."""

    def __init__(self, call):
        self.call = call
        self.tokens = {}
        self.finishes = {}
        self.starts = {}
        self.rejected = {}
        self.frames = []

    async def submit(self, stream_id, *, max_tokens=8, token_ids=PROMPT, **fields):
        sampling = engine_pb2.Sampling(max_tokens=max_tokens, ignore_eos=True)
        fields = {"request_id": f"r{stream_id}", "model": "sim", "sampling": sampling} | fields
        await self.send(submit=wire.Submit(stream_id=stream_id, token_ids=token_ids, **fields))

    async def send(self, **message):
        await self.call.write(wire.SessionRequest(**message))

    async def read(self, ack=True):
        async with asyncio.timeout(10):
            message = await self.call.read()
        if not isinstance(message, wire.SessionResponse):
            return None
        if message.WhichOneof("message") == "rejected":
            self.rejected[message.rejected.stream_id] = message.rejected
        elif message.WhichOneof("message") == "step":
            self._take(message.step)
            if ack:
                await self.send(ack=wire.Ack(frame=message.step.frame))
        return message

    def _take(self, step):
        self.frames.append(step)
        offset = 0
        for index, stream_id in enumerate(step.stream_ids):
            count = step.counts[index] if step.counts else 1
            self.tokens.setdefault(stream_id, []).extend(step.token_ids[offset : offset + count])
            offset += count
        assert offset == len(step.token_ids)
        self.starts |= {s.stream_id: s for s in step.starts}
        self.finishes |= {f.stream_id: f for f in step.finishes}

    async def until_finished(self, *stream_ids):
        while not set(stream_ids) <= self.finishes.keys():
            assert await self.read() is not None


@asynccontextmanager
async def session(hosted, proxy_id="test"):
    call = DecodeServiceStub(hosted.channel).Session()
    client = Client(call)
    await client.send(hello=wire.Hello(proxy_id=proxy_id))
    welcome = (await client.read()).welcome
    assert welcome.worker_id == hosted.host.identity.worker_id
    assert welcome.epoch == hosted.host.identity.epoch
    try:
        yield client
    finally:
        call.cancel()
