"""Request bodies: read within bounds of size and time, and taken apart."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request

from omni_common.errors import InvalidRequest
from omni_proxy.fields import Fields
from omni_proxy.openai_requests import parse_json

T = TypeVar("T")

_DISCARD_FACTOR = 8
_MAX_LIMIT = 1000
_INLINE_BYTES = 32 * 1024


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


async def parsed(request: Request, limits: HttpLimits, parse: Callable[[Fields], T]) -> T:
    """The body as `parse` has it; a long one is taken apart in a thread, so that streams keep flowing."""
    body = await read_body(request, limits)
    if len(body) <= _INLINE_BYTES:
        return parse(parse_json(body))
    return await asyncio.to_thread(lambda: parse(parse_json(body)))


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
