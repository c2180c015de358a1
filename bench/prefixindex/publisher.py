"""Workers that publish block events to kvstore; a process of its own.

Reads its duties as JSON from the first line of standard input, registers, prints {"ready": ...}, and begins at the next
line. Batches are made and packed before that. Ends with one JSON line.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import uvloop

from omni.engine.v1 import engine_pb2
from omni.kvstore.v1 import kvstore_service_pb2 as pb
from omni.kvstore.v1.kvstore_service_pb2_grpc import KvStoreServiceStub
from omni_common.rpc import channel
from prefixindex.population import BLOCK_TOKENS, MODEL, worker_names
from prefixindex.traffic import EPOCH, SHAPES, batches, blocks_in, last_key

PUBLISH = f"/{pb.DESCRIPTOR.services_by_name['KvStoreService'].full_name}/PublishBlocks"
_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class PublisherDuties:
    """`interval_s` between the batches of one worker; 0 sends as fast as they are taken."""

    port: int
    shape: str
    workers: int
    batches: int
    seed: int
    interval_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Packed:
    data: bytes
    last_key: str


async def publish(duties: PublisherDuties) -> dict[str, Any]:
    """When it began and ended (time.monotonic, which processes share), and CPU; when each batch went out if paced.

    Raises:
        RuntimeError: kvstore saw a gap.
    """
    packed, blocks = _pack(duties)
    async with channel(f"127.0.0.1:{duties.port}") as connected:
        stub: Any = KvStoreServiceStub(connected)
        leases = [await _register(stub, worker) for worker in packed]
        marks = [batch.last_key for sent in packed.values() for batch in (sent if duties.interval_s else sent[-1:])]
        _say({"ready": True, "marks": marks, "blocks": blocks})
        await asyncio.to_thread(sys.stdin.readline)
        send = connected.stream_unary(PUBLISH)
        sent: dict[str, float] = {}
        cpu_s, start_s = time.process_time(), time.monotonic()
        answers = await asyncio.gather(
            *(
                send(_paced(batch, duties, index, start_s, sent), timeout=_DEADLINE_S)
                for index, batch in enumerate(packed.values())
            )
        )
        end_s, cpu_s = time.monotonic(), time.process_time() - cpu_s
        for lease in leases:
            lease.cancel()
    for answer in map(pb.PublishBlocksResponse.FromString, answers):
        if answer.wants_snapshot or answer.accepted_sequence != duties.batches:
            raise RuntimeError(f"kvstore took {answer.accepted_sequence} of {duties.batches} batches")
    return {"start_s": start_s, "end_s": end_s, "cpu_s": cpu_s, "sent": sent if duties.interval_s else {}}


def _pack(duties: PublisherDuties) -> tuple[dict[str, list[Packed]], int]:
    packed: dict[str, list[Packed]] = {}
    blocks = 0
    for worker in worker_names(duties.workers):
        packed[worker] = []
        for request in batches(worker, SHAPES[duties.shape], duties.batches, duties.seed):
            blocks += blocks_in(request)
            packed[worker].append(Packed(request.SerializeToString(), last_key(request).hex()))
    return packed, blocks


async def _paced(
    packed: Sequence[Packed], duties: PublisherDuties, index: int, start_s: float, sent: dict[str, float]
) -> AsyncIterator[bytes]:
    """Workers begin evenly spread over the interval, as they do where each has a clock of its own."""
    for number, batch in enumerate(packed):
        if duties.interval_s:
            due_s = start_s + (number + index / duties.workers) * duties.interval_s
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            sent[batch.last_key] = time.monotonic()
        yield batch.data


async def _register(stub: Any, worker: str) -> Any:
    """The open stream of the worker's lease, which outlasts the benchmark."""
    info = engine_pb2.WorkerInfo(
        worker_id=worker, address="127.0.0.1:1", epoch=EPOCH, model=MODEL, block_size=BLOCK_TOKENS
    )
    call = stub.Register(timeout=2 * _DEADLINE_S)
    await call.write(pb.RegisterRequest(info=info))
    await call.read()
    return call


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def main() -> None:
    duties = PublisherDuties(**json.loads(sys.stdin.readline()))
    _say(uvloop.run(publish(duties)))


if __name__ == "__main__":
    main()
