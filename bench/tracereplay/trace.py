"""A trace of requests: when each came, how long it was, and the blocks of its prompt. Mooncake's format.

One JSON object per line: timestamp (ms), input_length, output_length (tokens), hash_ids (one per 512 tokens of input;
equal ids mean equal blocks).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Request:
    """`keys` are those of the full blocks of the prompt, chained, so that an equal key means an equal prefix."""

    at_s: float
    input_tokens: int
    output_tokens: int
    keys: tuple[bytes, ...]
    tenant: str = ""


def read_trace(path: Path, limit: int | None = None, speed: float = 1.0) -> list[Request]:
    """The first `limit` requests in order of arrival, arriving `speed` times as fast."""
    with path.open() as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(limit or 2**62), strict=False)]
    requests = [
        Request(
            row["timestamp"] / 1000 / speed,
            row["input_length"],
            row["output_length"],
            chained(row["hash_ids"][: row["input_length"] // BLOCK_TOKENS]),
        )
        for row in rows
    ]
    return sorted(requests, key=lambda request: request.at_s)


def chained(hash_ids: Sequence[int]) -> tuple[bytes, ...]:
    """16 bytes per block. A block that is not full has no key: engines do not keep it."""
    keys: list[bytes] = []
    last = b""
    for hash_id in hash_ids:
        last = xxhash.xxh3_128_digest(last + hash_id.to_bytes(8, "little"))
        keys.append(last)
    return tuple(keys)


def reusable(request: Request) -> int:
    """Blocks that can come from a cache: full ones, and never the last token's, whose logits are needed."""
    return min(len(request.keys), (request.input_tokens - 1) // BLOCK_TOKENS)


def best_hit_rate(requests: Sequence[Request]) -> float:
    """With one endless cache that fills at once: the most that any routing could reach."""
    seen: set[bytes] = set()
    hit_blocks = 0
    for request in requests:
        for key in request.keys[: reusable(request)]:
            if key not in seen:
                break
            hit_blocks += 1
        seen.update(request.keys)
    return hit_blocks * BLOCK_TOKENS / max(1, sum(request.input_tokens for request in requests))
