"""Block events as engines make them, in batches ready to be sent. Pure.

Every worker keeps a window of runs: a batch stores new runs and removes as many old ones once the window is full.
A *block event* is one block stored or removed, however many travel in one message.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from omni.kvstore.v1 import kvstore_service_pb2 as pb
from omni_common.blocks import KEY_BYTES, SPAN_BLOCKS
from prefixindex.population import HBM

EPOCH = 1
_WINDOW_BATCHES = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """`runs` stored per batch, of `run_blocks` blocks each."""

    runs: int
    run_blocks: int


SHAPES = {
    # A prompt of 8,192 tokens computed; one of the kind evicted.
    "prefill": Shape(runs=2, run_blocks=256),
    # 32 sequences that have each filled one more block.
    "decode": Shape(runs=32, run_blocks=1),
}


def batches(worker: str, shape: Shape, count: int, seed: int) -> Iterator[pb.PublishBlocksRequest]:
    """`count` batches of one worker, numbered from 1. Random keys, as hashes are."""
    rng = np.random.default_rng([seed, *worker.encode()])
    held: deque[pb.BlockEvent] = deque()
    for sequence in range(1, count + 1):
        fresh = [_stored(rng, shape.run_blocks) for _ in range(shape.runs)]
        held.extend(fresh)
        gone = [_removed(held.popleft()) for _ in range(max(0, len(held) - _WINDOW_BATCHES * shape.runs))]
        yield pb.PublishBlocksRequest(worker_id=worker, epoch=EPOCH, sequence=sequence, events=[*gone, *fresh])


def _stored(rng: np.random.Generator, blocks: int) -> pb.BlockEvent:
    keys = rng.bytes(blocks * KEY_BYTES)
    first = int(rng.integers(0, SPAN_BLOCKS // blocks)) * blocks
    span = rng.bytes(KEY_BYTES) if first else keys[:KEY_BYTES]
    return pb.BlockEvent(action=pb.BLOCK_ACTION_STORED, medium=HBM, block_keys=keys, span=span, positions=[first])


def _removed(stored: pb.BlockEvent) -> pb.BlockEvent:
    return pb.BlockEvent(
        action=pb.BLOCK_ACTION_REMOVED, medium=stored.medium, block_keys=stored.block_keys, span=stored.span
    )


def blocks_in(request: pb.PublishBlocksRequest) -> int:
    return sum(len(event.block_keys) for event in request.events) // KEY_BYTES


def last_key(request: pb.PublishBlocksRequest) -> bytes:
    """Names a batch: whoever sees this key stored has seen the batch."""
    return bytes(request.events[-1].block_keys[-KEY_BYTES:])
