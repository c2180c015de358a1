"""The configuration in force, and the file it comes from."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Generic, TypeVar

import orjson
from fastapi import Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge

from omni_common.errors import OmniError
from omni_proxy.metrics import from_zero
from omni_proxy.schedule_config import ScheduleConfig

log = logging.getLogger(__name__)

_INTERVAL_S = 1.0

T = TypeVar("T")


class Live(Generic[T]):
    """A value that is replaced whole. Subscribers hear of a new one in the order they came, before it is in force.

    If one of them refuses it, those that heard of it hear of the former one again.
    """

    def __init__(self, value: T) -> None:
        self.value = value
        self._subscribers: list[Callable[[T], None]] = []

    def subscribe(self, on_change: Callable[[T], None]) -> None:
        self._subscribers.append(on_change)

    def set(self, value: T) -> None:
        told: list[Callable[[T], None]] = []
        try:
            for on_change in self._subscribers:
                told.append(on_change)
                on_change(value)
        except BaseException:
            for on_change in told:
                on_change(self.value)
            raise
        self.value = value


class ConfigMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        reloads = Counter(
            "omni_proxy_config_reloads", "Changes of the scheduler's file, by what became of them", ["result"],
            registry=registry,
        )  # fmt: skip
        self.reloads = from_zero(reloads, ("applied", "invalid", "failed"))
        self._info = Gauge("omni_proxy_config_info", "1 for the values in force", ["digest"], registry=registry)

    def show(self, config: ScheduleConfig) -> None:
        self._info.clear()
        self._info.labels(config.digest).set(1)


class ConfigWatcher:
    """Puts a changed file into force. One that is not valid changes nothing but a counter and the log."""

    def __init__(self, path: Path, base: ScheduleConfig, live: Live[ScheduleConfig], metrics: ConfigMetrics) -> None:
        """Sections the file does not have are those of `base`."""
        self._path = path
        self._base = base
        self._live = live
        self._metrics = metrics
        self._content: bytes | None = None
        self._seen: tuple[int, int] | None = None
        self._latest: bytes | None = None

    async def run(self, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep) -> None:
        """Until cancelled."""
        while True:
            await sleep(_INTERVAL_S)
            await self.check()

    async def check(self) -> None:
        """Look at the file once. Its bytes count, not its time, and only when a second look finds them as they were.

        Else one that is still being written would do for a while without tenants and keys that it is to have.
        """
        try:
            content = await asyncio.to_thread(self._changed)
        except OSError as error:
            log.warning("cannot read the scheduler's configuration", extra={"error": str(error)})
            return
        if content is None:
            return
        try:
            config = self._with_its_predictor(await asyncio.to_thread(ScheduleConfig.parse, content, self._base))
            if config == self._live.value:
                return
            self._live.set(config)
        except OmniError as error:
            self._metrics.reloads.labels("invalid").inc()
            log.error("the scheduler's configuration is not valid; the former stays", extra={"error": error.message})
            return
        except Exception:
            # A plug-in of a third party may raise anything; the next change of the file has its chance.
            self._metrics.reloads.labels("failed").inc()
            log.exception("the scheduler's configuration could not be put into force")
            return
        self._metrics.reloads.labels("applied").inc()
        self._metrics.show(config)
        log.info("the scheduler's configuration has changed", extra={"digest": config.digest})

    def _with_its_predictor(self, config: ScheduleConfig) -> ScheduleConfig:
        """The one of the start stays in force, and is shown."""
        running = self._live.value.predictor
        if config.predictor == running:
            return config
        log.warning("another predictor takes a restart of the proxy", extra={"running": running.name})
        return config.model_copy(update={"predictor": running})

    def _changed(self) -> bytes | None:
        """The file's bytes if they are not those of the last time, and were the same at the last look."""
        status = self._path.stat()
        seen = (status.st_mtime_ns, status.st_size)
        if seen != self._seen:
            before, self._latest = self._latest, self._path.read_bytes()
            self._seen = seen
            if self._latest != before:
                return None
        if self._latest == self._content:
            return None
        self._content = self._latest
        return self._content


class ConfigPage:
    """`GET /config`."""

    def __init__(self, live: Live[ScheduleConfig], path: Path | None) -> None:
        self._live = live
        self._path = path

    async def config(self, request: Request) -> Response:
        config = self._live.value
        source = None if self._path is None else self._path.name
        body = {"file": source, "digest": config.digest, "effective": config.effective}
        return Response(orjson.dumps(body), media_type="application/json")
