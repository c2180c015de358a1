"""Public test helpers: a service in process on a free port, and a channel to it."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc

from omni_common.rpc import Server, Servicer, channel


@asynccontextmanager
async def serve(servicers: Sequence[Servicer]) -> AsyncIterator[grpc.aio.Channel]:
    """Serve on 127.0.0.1 on a free port and yield a channel; stops without grace on exit."""
    server = Server(servicers)
    port = await server.start("127.0.0.1:0")
    try:
        async with channel(f"127.0.0.1:{port}") as connected:
            yield connected
    finally:
        await server.stop(0)
