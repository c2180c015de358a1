"""The side channel of the simulated connector: who holds a lease, and that it was pulled.

puller -> {"lease": id}\\n     holder -> {"ok": true, "num_tokens": n}\\n     puller waits the transfer's time,
then closes the connection; the holder frees the lease when it sees that.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable

from omni_common.errors import Unavailable
from omni_engine.ports import KvHandle
from omni_engine.sim.settings import SimSettings

_MAX_LINE = 4096


class LeaseServer:
    """Answers pulls of this engine's leases on a free port."""

    def __init__(self, pin: Callable[[str], int | None], free: Callable[[str], None], timeout_s: float) -> None:
        self._pin = pin
        self._free = free
        self._timeout_s = timeout_s
        self._server: asyncio.Server | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self.port = 0

    async def start(self, host: str) -> None:
        self._server = await asyncio.start_server(self._accept, host, 0, limit=_MAX_LINE)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self._server is None:
            return
        self._server.close()
        for call in self._calls:
            call.cancel()
        if self._calls:
            await asyncio.wait(self._calls)
        await self._server.wait_closed()

    def handle(
        self, lease_id: str, num_tokens: int, num_blocks: int, settings: SimSettings, engine_id: str, weights: str
    ) -> KvHandle:
        """What a puller needs to find this server and the lease, and to know whether the blocks are for it."""
        target = {"connector": "sim", "host": settings.kv_host, "port": self.port, "lease": lease_id}
        target["weights"] = weights
        return KvHandle(
            opaque=json.dumps(target).encode(),
            engine_id=engine_id,
            lease_id=lease_id,
            num_tokens=num_tokens,
            num_blocks=num_blocks,
            block_size=settings.block_size,
            lease_s=settings.lease_s,
        )

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        call = asyncio.create_task(self._answer(reader, writer), name="sim-pull")
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lease_id, is_pinned = "", False
        try:
            async with asyncio.timeout(self._timeout_s):
                lease_id = str(json.loads(await reader.readline())["lease"])
                num_tokens = self._pin(lease_id)
                is_pinned = num_tokens is not None
                writer.write(json.dumps({"ok": num_tokens is not None, "num_tokens": num_tokens}).encode() + b"\n")
                await writer.drain()
                await reader.read()
        except (OSError, TimeoutError, ValueError, KeyError, TypeError):
            pass  # A puller that is gone or speaks nonsense ends its own pull only.
        finally:
            if is_pinned:
                self._free(lease_id)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class Pull:
    """One pull in progress: the holder keeps the lease until this is closed."""

    def __init__(self, writer: asyncio.StreamWriter, num_tokens: int) -> None:
        self._writer = writer
        self.num_tokens = num_tokens

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


async def open_pull(handle: KvHandle, timeout_s: float) -> Pull:
    """Raises Unavailable when the holder is away, does not know the lease, or does not answer in time."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout_s):
            target = json.loads(handle.opaque)
            reader, writer = await asyncio.open_connection(target["host"], target["port"], limit=_MAX_LINE)
            writer.write(json.dumps({"lease": target["lease"]}).encode() + b"\n")
            await writer.drain()
            answer = json.loads(await reader.readline())
            if answer["ok"]:
                return Pull(writer, int(answer["num_tokens"]))
    except (OSError, TimeoutError, ValueError, KeyError, TypeError) as error:
        await _closed(writer)
        raise Unavailable(f"the holder did not answer: {type(error).__name__}", reason="pull_failed") from None
    except asyncio.CancelledError:
        await _closed(writer)
        raise
    await _closed(writer)
    raise Unavailable("the holder has no such lease", reason="pull_failed")


async def _closed(writer: asyncio.StreamWriter | None) -> None:
    if writer is not None:
        await Pull(writer, 0).close()


def weights_in(handle: KvHandle) -> str:
    """With which its blocks were computed; empty where it does not tell."""
    try:
        return str(json.loads(handle.opaque)["weights"])
    except (ValueError, KeyError, TypeError):
        return ""
