"""The HTTP server's process: listen, wait for a signal, drain, stop."""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import ssl
from collections.abc import Iterator
from functools import partial

import uvicorn
from opentelemetry import trace

from omni_common.telemetry import set_up
from omni_proxy import __version__
from omni_proxy.admission import Admission
from omni_proxy.app import running
from omni_proxy.connections import Connection
from omni_proxy.last_words import LastWords
from omni_proxy.settings import Settings

log = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_S = 75
_GC_THRESHOLDS = 20_000, 25, 50
"""Objects live long here, as long as an answer, and requests leave no cycles behind. With Python's own thresholds, a
tenth of the time under 1,000 streams went into looking at them again and again, and each full look held up all streams
for a tenth of a second."""
_LAST_CALL_S = 0.5
"""How long those who connected just before the end have to send their request, which is refused with a reason."""


class _Handshakes(ssl.SSLObject):
    """Tells of clients that cannot agree on TLS, such as those that write http:// for https://."""

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            log.info("TLS handshake failed", extra={"reason": error.reason})
            raise


class _Server(uvicorn.Server):
    """Leaves signals to `_stop_on_signal`, which drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            log.info("serving", extra={"address": host, "port": port})


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT and drained."""
    telemetry = set_up(settings, f"{settings.host}:{settings.port}", __version__)
    try:
        async with running(settings, telemetry.registry, trace.get_tracer("omni.proxy")) as proxy:
            # What lives until the end is not looked at again: a full collection of it would hold up every stream.
            gc.collect()
            gc.freeze()
            gc.set_threshold(*_GC_THRESHOLDS)
            app = LastWords(proxy.app)
            server = _Server(_config(settings, app))
            stopper = asyncio.create_task(_stop_on_signal(server, app, proxy.admission, settings.drain_timeout_s))
            try:
                await server.serve()
            finally:
                stopper.cancel()
                await asyncio.gather(stopper, return_exceptions=True)
    finally:
        telemetry.close()


def _config(settings: Settings, app: object) -> uvicorn.Config:
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=partial(Connection, patience_s=settings.body_timeout_s),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=1,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        ssl_certfile=settings.tls.cert_file,
        ssl_keyfile=settings.tls.key_file,
    )
    config.load()
    if config.ssl is not None:
        config.ssl.sslobject_class = _Handshakes
    return config


async def _stop_on_signal(server: uvicorn.Server, app: LastWords, admission: Admission, drain_timeout_s: float) -> None:
    """First signal: refuse new requests, finish the running ones, then stop listening. Second signal: stop at once."""
    stop, now = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        (now if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    await stop.wait()
    log.info("draining", extra={"timeout_s": drain_timeout_s})
    admission.is_draining = True
    waits = [asyncio.ensure_future(admission.drained()), asyncio.ensure_future(now.wait())]
    await asyncio.wait(waits, timeout=drain_timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for listener in server.servers:
        listener.close()
    await asyncio.wait(waits[1:], timeout=_LAST_CALL_S)
    for wait in waits:
        wait.cancel()
    await app.cut_off()
    server.should_exit = True
