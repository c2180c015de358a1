"""Builds and runs the decode worker."""

from omni_decode import __version__
from omni_decode.settings import Settings
from omni_engine.hosting.host import run_worker


async def serve(settings: Settings) -> int:
    """Serve until a signal; returns the process's exit code."""
    return await run_worker(settings, __version__)
