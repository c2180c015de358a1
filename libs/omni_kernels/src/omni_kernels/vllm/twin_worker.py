"""The worker of the out-of-tree twin. Imported by vLLM in its worker processes."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker


class TwinWorker(CPUWorker):  # type: ignore[misc]
    """vLLM's CPU worker. Out-of-tree platforms are asked for a memory pool, which a CPU has none of."""

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[Any]:
        return nullcontext()
