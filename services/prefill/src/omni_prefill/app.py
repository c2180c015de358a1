"""Builds and runs the prefill worker."""

from omni_engine.hosting.host import run_worker
from omni_prefill import __version__
from omni_prefill.settings import Settings


async def serve(settings: Settings) -> int:
    """Serve until a signal; returns the process's exit code."""
    return await run_worker(settings, __version__)
