"""A stack with two proxies: one learns its workers from the kvstore, one knows them by address, through relays."""

import asyncio
import contextlib
import os
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from live import MODEL_DIR, ROOT, LiveStack, free_port
from relay import Relay

SECOND = "proxy-b"
RESTART_S = 1.0
POLL_S = 0.5
COUNTED = ("retries", "resumes", "ejections", "hedges", "stalls", "aborts", "kv_releases")
IDLE = ("running", "waiting", "queued_tokens", "kv_usage", "leases")
UNCHARGED = ("requests", "uncached_tokens")
# A first run of a prefill worker's lease, and then some.
QUIET_TIMEOUT_S = 120.0


class SecondProxy:
    """A proxy process of our own, started again when it dies."""

    def __init__(self, workers: Sequence[str], log: Path, environ: Mapping[str, str]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        own = {"PORT": str(self.port), "MODEL_DIR": str(MODEL_DIR), "WORKERS": str(list(workers))}
        self._environ = {**os.environ, **environ, **{f"OMNI_PROXY_{name}": value for name, value in own.items()}}
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with self._log.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "omni_proxy"), env=self._environ, cwd=ROOT, stdout=log, stderr=log
                )
            try:
                await self._process.wait()
            finally:
                if self._process.returncode is None:
                    self._process.kill()
                    await self._process.wait()
            await asyncio.sleep(RESTART_S)


@dataclass(slots=True)
class Pair:
    """The running stack. `seen` sums the proxies' counters over their restarts."""

    stack: LiveStack
    second: SecondProxy
    lines: Mapping[str, Relay]
    seen: Counter[str] = field(default_factory=Counter)

    @property
    def urls(self) -> Sequence[str]:
        return (self.stack.url, self.second.url)

    @property
    def processes(self) -> list[str]:
        return [*self.stack.processes(), "redis", SECOND]

    def pid(self, name: str) -> int | None:
        if name == SECOND:
            return self.second.pid
        try:
            if name != "redis":
                return self.stack.pid(name)
            children = psutil.Process(self.stack.pid("kvstore")).children(recursive=True)
        except psutil.NoSuchProcess:
            return None
        return next((child.pid for child in children if "redis-server" in child.name()), None)

    def may_die(self, name: str) -> bool:
        """Somebody else of its kind must be well; the other services may die as they like."""
        kind = name.rpartition("-")[0] or name
        if kind in ("prefill", "decode"):
            others = [n for n in self.stack.processes() if n.startswith(f"{kind}-") and n != name]
            return any(self.stack.is_serving(other) for other in others)
        other = {"proxy": SECOND, SECOND: "proxy"}.get(name)
        if other is None:
            return True
        pid = self.pid(other)
        return pid is not None and psutil.pid_exists(pid)

    async def watch_counters(self) -> None:
        """Until cancelled."""
        last: dict[str, Counter[str]] = {}
        async with httpx.AsyncClient(timeout=5, trust_env=False) as http:
            while True:
                for url in self.urls:
                    with contextlib.suppress(httpx.HTTPError):
                        page = (await http.get(f"{url}/metrics")).text
                        now = _counters(page)
                        before = last.get(url, Counter())
                        for name, value in now.items():
                            self.seen[name] += value - before[name] if value >= before[name] else value
                        last[url] = now
                await asyncio.sleep(POLL_S)

    async def quiet(self) -> list[str]:
        """What is still held anywhere after a while without requests: nothing, or a leak."""
        deadline = asyncio.get_running_loop().time() + QUIET_TIMEOUT_S
        async with httpx.AsyncClient(timeout=5, trust_env=False) as http:
            while True:
                try:
                    held = [leak for url in self.urls for leak in await self._held(http, url)]
                except (httpx.HTTPError, ValueError) as error:
                    held = [f"no answer: {type(error).__name__}"]
                if not held or asyncio.get_running_loop().time() > deadline:
                    return held
                await asyncio.sleep(POLL_S)

    async def _held(self, http: httpx.AsyncClient, url: str) -> list[str]:
        workers: list[dict[str, Any]] = (await http.get(f"{url}/workers")).json()["workers"]
        page = (await http.get(f"{url}/metrics")).text
        found = [f"{w['id']} refuses work: {w['refusal']}" for w in workers if not w["takes_work"]]
        for part, names in (("load", IDLE), ("in_flight", UNCHARGED)):
            found += [f"{w['id']} {part}.{n} = {w[part][n]}" for w in workers for n in names if w[part][n]]
        for name in re.findall(r"^(omni_proxy_(?:running_sequences|queue_\w+|waiting\w*)(?:{.*})?) [1-9]", page, re.M):
            found.append(f"{name} is not 0")
        expected = len(self.lines)
        return found if len(workers) == expected else [*found, f"{len(workers)} of {expected} workers known"]


def _counters(page: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, labels, value in re.findall(r"^omni_proxy_(\w+)_total(?:{(.*)})? (\S+)$", page, re.M):
        if name in COUNTED:
            found[f"{name} {labels}".strip()] += int(float(value))
    return found


@asynccontextmanager
async def pair(home: Path, *arguments: str, environ: Mapping[str, str]) -> AsyncIterator[Pair]:
    stack = LiveStack(home, *arguments, environ=dict(environ))
    try:
        await asyncio.to_thread(stack.wait_healthy)
        engines = {n: r["address"] for n, r in stack.processes().items() if n.startswith(("prefill", "decode"))}
        async with contextlib.AsyncExitStack() as open_:
            lines = {n: await open_.enter_async_context(Relay(address).open()) for n, address in engines.items()}
            second = SecondProxy([line.address for line in lines.values()], home / "second.log", environ)
            running = Pair(stack, second, lines)
            tasks = [asyncio.create_task(second.run()), asyncio.create_task(running.watch_counters())]
            try:
                assert not await running.quiet(), "the stack did not start idle"
                yield running
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        await asyncio.to_thread(stack.close)
