import asyncio
from omni.decode.v1 import decode_service_pb2 as d
from omni.decode.v1.decode_service_pb2_grpc import DecodeServiceStub
from omni.engine.v1 import engine_pb2
from omni.prefill.v1 import prefill_service_pb2 as p
async def test_slice(hosted):
    S = engine_pb2.Sampling(max_tokens=8, ignore_eos=True)
    async with hosted() as pre, hosted() as dec:
        r = await pre.prefill.Prefill(p.PrefillRequest(request_id="a", model="sim", token_ids=range(100), sampling=S), timeout=5)
        print(r)
        call = DecodeServiceStub(dec.channel).Session()
        await call.write(d.SessionRequest(hello=d.Hello(proxy_id="x")))
        print(await call.read())
        await call.write(d.SessionRequest(submit=d.Submit(stream_id=1, request_id="a", model="sim", token_ids=[*range(100), r.first_token_id], num_output_tokens=1, sampling=S, kv_handle=r.kv_handle)))
        while True:
            m = await call.read(); print(m)
            if m.step.finishes: break
        await call.done_writing()
        assert not isinstance(await call.read(), d.SessionResponse)
        await dec.idle(); await pre.idle()
