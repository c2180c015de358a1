"""Which of Omni's ops an engine's workers ran, and on which backend."""

import asyncio
from collections import Counter
from typing import Any

from omni_common.errors import Unavailable
from omni_engine.ports import KernelCalls

_TIMEOUT_S = 10.0


async def read_kernel_calls(core: Any) -> KernelCalls:
    """The sum over all workers of an engine core's client. Raises Unavailable when they do not answer."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            by_core = await core.call_utility_all_async("collective_rpc", "omni_kernel_calls", _TIMEOUT_S, (), None)
    except Exception as error:
        raise Unavailable(f"kernel calls cannot be read: {error}", reason="engine_dead") from error
    return summed([worker for workers in by_core for worker in workers])


def summed(workers: list[KernelCalls]) -> KernelCalls:
    total: dict[str, Counter[str]] = {}
    for worker in workers:
        for op, backends in worker.items():
            total.setdefault(op, Counter()).update(backends)
    return {op: dict(backends) for op, backends in sorted(total.items())}
