"""Waiting longer after each failure in a row."""

import asyncio
import random

_FIRST_S = 0.05
_LONGEST_S = 2.0


class Backoff:
    """50 ms doubling up to 2 s, with jitter; `reset` after a success."""

    def __init__(self) -> None:
        self._failures = 0

    @property
    def is_first(self) -> bool:
        """No failure since the last success; the time to log."""
        return self._failures == 0

    def reset(self) -> None:
        self._failures = 0

    async def wait(self) -> None:
        longest = min(_LONGEST_S, _FIRST_S * 2 ** min(self._failures, 16))
        self._failures += 1
        await asyncio.sleep(longest * random.uniform(0.5, 1.0))
