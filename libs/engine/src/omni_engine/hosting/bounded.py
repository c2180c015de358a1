"""Calls of an engine that must not hurt their caller."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from omni_common.errors import DeadlineExceeded, Internal, OmniError

Answer = TypeVar("Answer")


async def bounded(call: Awaitable[Answer], timeout_s: float) -> Answer:
    """The call's answer. Raises OmniErrors only: whatever else the engine raises becomes `Internal`."""
    try:
        async with asyncio.timeout(timeout_s):
            return await call
    except OmniError:
        raise
    except TimeoutError:
        raise DeadlineExceeded(f"the engine did not answer within {timeout_s} s") from None
    except Exception as error:
        raise Internal(f"the engine failed: {type(error).__name__}: {error}", reason="engine") from error
