"""Request bodies: read within bounds of size and time."""

import asyncio
from dataclasses import dataclass

from fastapi import Request

from omni_common.errors import InvalidRequest

_DISCARD_FACTOR = 8
_MAX_LIMIT = 1000


@dataclass(frozen=True, slots=True)
class HttpLimits:
    max_body_bytes: int
    body_timeout_s: float
    request_timeout_s: float


def query_limit(request: Request, default: int) -> int:
    """`?limit=` of a page.

    Raises:
        InvalidRequest: it is no number from 1 to 1000.
    """
    given = request.query_params.get("limit")
    if given is None:
        return default
    if not given.isascii() or not given.isdigit() or not 1 <= int(given[:9]) <= _MAX_LIMIT:
        raise InvalidRequest(f"limit: must be between 1 and {_MAX_LIMIT}", field="limit", reason="invalid_value")
    return int(given)


async def read_body(request: Request, limits: HttpLimits) -> bytes:
    """The whole body, refused as soon as it is too long or too slow."""
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
        raise InvalidRequest(f"the body is larger than {limits.max_body_bytes} bytes", reason="body_too_large")
    return b"".join(chunks)
