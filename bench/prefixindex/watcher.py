"""Watches of kvstore that read block changes; a process of its own, as proxies are.

Reads its duties as JSON from the first line of standard input, prints {"ready": ...} once every watch has its snapshot,
and ends with one JSON line when every watch has seen every key that the second line names.
"""

import asyncio
import json
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import uvloop

from omni.kvstore.v1 import kvstore_service_pb2 as pb
from omni.kvstore.v1.kvstore_service_pb2_grpc import KvStoreServiceStub
from omni_common.blocks import KEY_BYTES
from omni_common.rpc import channel

_DEADLINE_S = 120.0


@dataclass(slots=True)
class Seen:
    """What one watch has been told; `marks` has when each wanted key was first seen stored."""

    blocks: int = 0
    messages: int = 0
    snapshots: int = 0
    marks: dict[bytes, float] = field(default_factory=dict)
    is_in_snapshot: bool = False

    def take(self, message: pb.WatchResponse, wanted: Collection[bytes], now_s: float) -> None:
        """Count a message's blocks, but not those of a snapshot, and look for the keys wanted."""
        self.messages += 1
        self.snapshots += message.snapshot
        self.is_in_snapshot |= message.snapshot
        for change in message.blocks:
            keys = change.event.block_keys
            if not self.is_in_snapshot:
                self.blocks += len(keys) // KEY_BYTES
            if change.event.action == pb.BLOCK_ACTION_STORED:
                for offset in range(0, len(keys), KEY_BYTES):
                    if (key := keys[offset : offset + KEY_BYTES]) in wanted:
                        self.marks.setdefault(key, now_s)
        if message.complete:
            self.is_in_snapshot = False


async def watch(port: int, watches: int) -> dict[str, Any]:
    """When each watch was done (time.monotonic), what it read, and CPU of all."""
    wanted: asyncio.Future[frozenset[bytes]] = asyncio.get_running_loop().create_future()
    started = [asyncio.Event() for _ in range(watches)]
    async with asyncio.timeout(_DEADLINE_S), asyncio.TaskGroup() as group:
        tasks = [group.create_task(_watch(port, event, wanted)) for event in started]
        for event in started:
            await event.wait()
        print(json.dumps({"ready": True}), flush=True)
        marks = json.loads(await asyncio.to_thread(sys.stdin.readline))
        cpu_s = time.process_time()
        wanted.set_result(frozenset(map(bytes.fromhex, marks)))
    return {"cpu_s": time.process_time() - cpu_s, "watches": [_result(task.result()) for task in tasks]}


def _result(seen: Seen) -> dict[str, Any]:
    return {
        "end_s": max(seen.marks.values()),
        "blocks": seen.blocks,
        "messages": seen.messages,
        "snapshots": seen.snapshots,
        "marks": {key.hex(): at for key, at in seen.marks.items()},
    }


async def _watch(port: int, started: asyncio.Event, wanted: "asyncio.Future[frozenset[bytes]]") -> Seen:
    async with channel(f"127.0.0.1:{port}") as connected:
        stub: Any = KvStoreServiceStub(connected)
        call = stub.Watch(pb.WatchRequest(blocks=True), timeout=_DEADLINE_S)
        while not (await call.read()).complete:
            pass
        started.set()
        marks, seen = await wanted, Seen()
        while len(seen.marks) < len(marks):
            seen.take(await call.read(), marks, time.monotonic())
        call.cancel()
    return seen


def main() -> None:
    duties = json.loads(sys.stdin.readline())
    print(json.dumps(uvloop.run(watch(duties["port"], duties["watches"]))), flush=True)


if __name__ == "__main__":
    main()
