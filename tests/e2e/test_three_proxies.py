"""Three real proxies over the same workers: each sees the others' work as they have it in their own ledgers.

Engines are simulated by wall clock and slow, so that work stays in flight while it is looked at; kvstore, wire and
proxies are real.
"""

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from prometheus_client import CollectorRegistry

from omni_engine.hosting.host import WorkerHost
from omni_engine.hosting.settings import WorkerSettings
from omni_engine.sim import SimEngine
from omni_proxy.app import running
from omni_proxy.settings import Settings

pytestmark = [pytest.mark.stack, pytest.mark.timeout(120)]

MODEL_DIR = Path(__file__).resolve().parents[2] / "models" / "tiny-moe"
ROLES = {"p1": "prefill", "p2": "prefill", "d1": "decode", "d2": "decode"}
PREFILLS = ("p1", "p2")
SLOW = {"max_num_batched_tokens": 64, "timing": {"prefill_token_ms": 4.0, "step_base_ms": 60.0}}
"""Up to a quarter of a second for a step with a prompt in it, 60 ms for one without."""
AT_ONCE = {"flow": {"lookahead_ms": 1e9}}
"""Nothing is held back in a proxy: its ledger has all that it was asked."""
DEADLINE_S = 30.0
NOTHING = (0, 0, 0)

Work = Mapping[str, tuple[int, int, int]]
"""By worker: prompts being prefilled, uncached tokens, sequences."""


class WorkerSettingsOf(WorkerSettings):
    service = "decode"


async def eventually(what: str, check: Callable[[], Awaitable[Any]]) -> Any:
    """The first true answer of `check`."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not (answer := await check()):  # noqa: ASYNC110, pages tell of no changes
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {DEADLINE_S} s: {what}") from None
    return answer


@asynccontextmanager
async def kvstore(folder: Path) -> AsyncIterator[str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "omni_kvstore"),
        env={"OMNI_KVSTORE_PORT": "0", "OMNI_KVSTORE_EMBEDDED_REDIS_DIR": str(folder / "redis")},
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(DEADLINE_S):
            while b'"serving"' not in (line := await process.stderr.readline()):
                assert line, "kvstore ended before serving"
        yield f"127.0.0.1:{json.loads(line)['port']}"
    finally:
        process.terminate()
        await process.communicate()


@asynccontextmanager
async def worker(name: str, role: str, kvstore: str) -> AsyncIterator[None]:
    values = {"worker_id": name, "role": role, "kvstore": kvstore, "model_dir": MODEL_DIR, "engine": "sim", "sim": SLOW}
    settings = WorkerSettingsOf.model_validate(values)
    host = WorkerHost(settings, SimEngine(settings.sim, settings.model_name), CollectorRegistry())
    await host.start()
    serving = asyncio.create_task(host.serve())
    try:
        yield
    finally:
        serving.cancel()
        await asyncio.wait({serving})
        await host.close()


@dataclass(slots=True)
class Proxy:
    """One proxy, asked over HTTP without a socket."""

    client: httpx.AsyncClient
    asked: set["asyncio.Task[httpx.Response]"] = field(default_factory=set)

    async def workers(self) -> dict[str, dict[str, Any]]:
        page = (await self.client.get("/workers")).json()["workers"]
        return {worker["id"]: worker for worker in page}

    async def own(self) -> Work:
        """What its ledger holds."""
        in_flight = {name: worker["in_flight"] for name, worker in (await self.workers()).items()}
        return {
            name: (it["prefills"], it["uncached_tokens"], 0 if name in PREFILLS else it["requests"])
            for name, it in in_flight.items()
        }

    async def others(self) -> Work:
        """What workers say of all other proxies."""
        loads = {name: worker["load"] for name, worker in (await self.workers()).items()}
        return {
            name: (load["others_prefills"], load["others_uncached_tokens"], load["others_sequences"])
            for name, load in loads.items()
        }

    async def complete(self, prompt: list[int], max_tokens: int) -> httpx.Response:
        body = {"model": MODEL_DIR.name, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        answer = await self.client.post("/v1/completions", json=body | {"ignore_eos": True}, timeout=None)
        return answer.raise_for_status()

    def begin(self, prompt: list[int], max_tokens: int) -> None:
        """As `complete`, without waiting for it."""
        self.asked.add(asyncio.create_task(self.complete(prompt, max_tokens)))

    async def give_up(self) -> None:
        """As clients that leave."""
        for task in self.asked:
            task.cancel()
        await asyncio.gather(*self.asked, return_exceptions=True)
        self.asked.clear()


@pytest.fixture
async def proxies(tmp_path: Path) -> AsyncIterator[tuple[Proxy, Proxy, Proxy]]:
    """All see all workers."""
    config = tmp_path / "scheduler.json"
    config.write_text(json.dumps(AT_ONCE))
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(kvstore(tmp_path))
        for name, role in ROLES.items():
            await stack.enter_async_context(worker(name, role, address))
        made = []
        for name in "abc":
            values = {"model_dir": MODEL_DIR, "kvstore": address, "proxy_id": name, "scheduler_config": config}
            one = await stack.enter_async_context(
                running(Settings.model_validate(values), CollectorRegistry(), trace.get_tracer("test"))
            )
            transport = httpx.ASGITransport(one.app)
            client = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://proxy"))
            made.append(Proxy(client))
        for proxy in made:
            await eventually("all workers take work", lambda proxy=proxy: has_all(proxy))  # type: ignore[misc]
        a, b, c = made
        try:
            yield a, b, c
        finally:
            for proxy in made:
                await proxy.give_up()


async def has_all(proxy: Proxy) -> bool:
    return {name for name, worker in (await proxy.workers()).items() if worker["takes_work"]} == set(ROLES)


def added(works: list[Work]) -> Work:
    return {name: tuple(map(sum, zip(*(work[name] for work in works), strict=True))) for name in ROLES}  # type: ignore[misc]


class Prompts:
    """No two begin alike."""

    def __init__(self) -> None:
        self._random = random.Random(1)

    def next(self, tokens: int) -> list[int]:
        return [self._random.randrange(1000) for _ in range(tokens)]


async def in_flight(proxies: tuple[Proxy, ...]) -> tuple[int, ...]:
    """Over all workers and proxies."""
    total = added([await proxy.own() for proxy in proxies])
    return tuple(map(sum, zip(*total.values(), strict=True)))


async def agree(proxies: tuple[Proxy, ...]) -> bool:
    """Each sees of the others what they have themselves."""
    own = [await proxy.own() for proxy in proxies]
    seen = [await proxy.others() for proxy in proxies]
    return all(seen[i] == added(own[:i] + own[i + 1 :]) for i in range(len(proxies)))


async def is_quiet(proxies: tuple[Proxy, ...]) -> bool:
    """Nothing is left in any ledger, nor in any worker's account of anybody."""
    for proxy in proxies:
        workers = await proxy.workers()
        loads = [worker["load"] for worker in workers.values()]
        left = [*(await proxy.own()).values(), *(await proxy.others()).values()]
        left += [(load["running"], load["waiting"], load["leases"]) for load in loads]
        if any(one != NOTHING for one in left):
            return False
    return True


async def test_each_sees_the_sum_of_the_others_work(proxies: tuple[Proxy, Proxy, Proxy]) -> None:
    prompts = Prompts()
    for proxy, count in zip(proxies, (3, 2, 1), strict=True):
        for _ in range(count):
            proxy.begin(prompts.next(40), 2000)

    async def all_decode() -> bool:
        return await in_flight(proxies) == (0, 0, 6) and await agree(proxies)

    await eventually("six sequences run and everybody knows of them", all_decode)
    for proxy, lengths in zip(proxies, ((1500,), (1600, 1700), (1800, 1900, 2000)), strict=True):
        for tokens in lengths:
            proxy.begin(prompts.next(tokens), 4)

    async def all_prefill() -> bool:
        return await in_flight(proxies) == (6, 10_500, 6) and await agree(proxies)

    await eventually("six prompts are being computed and everybody knows of them", all_prefill)
    for number, proxy in enumerate(proxies):
        await proxy.give_up()
        if number == 0:
            await eventually("the others know that they are gone", lambda: agree(proxies))
    await eventually("nothing is left", lambda: is_quiet(proxies))


async def test_what_one_proxy_sends_makes_the_others_choose_otherwise(proxies: tuple[Proxy, Proxy, Proxy]) -> None:
    prompts, (first, *rest) = Prompts(), proxies
    first.begin(prompts.next(4000), 1)

    async def chosen() -> str | None:
        return next((name for name, work in (await first.own()).items() if work[0]), None)

    busy = await eventually("the prompt is on its way", chosen)
    for proxy in rest:

        async def knows(proxy: Proxy = proxy) -> bool:
            return (await proxy.others())[busy] == (1, 4000, 0)

        await eventually("the prompt is known of", knows)
        for _ in range(3):
            await proxy.complete(prompts.next(32), 1)
        dispatched = {name: worker["in_flight"]["dispatched"] for name, worker in (await proxy.workers()).items()}
        assert dispatched == dict.fromkeys(ROLES, 0) | {next(name for name in PREFILLS if name != busy): 3}
    assert (await first.own())[busy] == (1, 4000, 0), "the prompt was computed too soon: the test shows nothing"
    await first.give_up()
    await eventually("nothing is left", lambda: is_quiet(proxies))
