"""Request bodies: read within bounds of size and time."""

import asyncio
from dataclasses import dataclass

from fastapi import Request

from omni_common.errors import InvalidRequest

_DISCARD_FACTOR = 8


@dataclass(frozen=True, slots=True)
class HttpLimits:
    max_body_bytes: int
    body_timeout_s: float
    request_timeout_s: float


async def read_body(request: Request, limits: HttpLimits) -> bytes:
    """The whole body, refused as soon as it is too long or too slow."""
    too_large = InvalidRequest(f"the body is larger than {limits.max_body_bytes} bytes", reason="body_too_large")
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limits.max_body_bytes:
                    chunks.append(chunk)
                    continue
                # A client that still sends would see a reset instead of the answer; so a little more is read.
                chunks.clear()
                if size > _DISCARD_FACTOR * limits.max_body_bytes:
                    break
    except TimeoutError:
        raise InvalidRequest(f"no whole body within {limits.body_timeout_s} s", reason="body_timeout") from None
    if size > limits.max_body_bytes:
        raise too_large
    return b"".join(chunks)
