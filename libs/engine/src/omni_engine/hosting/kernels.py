"""What the engine runs on Omni's ops, read from its processes now and then: metrics are collected without waiting."""

import asyncio
import logging

from omni_common.errors import Unavailable
from omni_engine.ports import Engine, KernelCalls

log = logging.getLogger(__name__)


class KernelUsage:
    """`calls` are those of the last reading, at most `interval_s` and one step old while the engine answers."""

    def __init__(self, engine: Engine, interval_s: float = 5.0) -> None:
        self._engine = engine
        self._interval_s = interval_s
        self.calls: KernelCalls = {}

    async def run(self) -> None:
        """Read until cancelled; returns where the engine runs on its own kernels only."""
        while True:
            try:
                calls = await self._engine.kernel_calls()
                if calls is None:
                    return
                self.calls = calls
            except Unavailable as error:
                log.warning("kernel calls were not read", extra={"error": error.message})
            await asyncio.sleep(self._interval_s)
