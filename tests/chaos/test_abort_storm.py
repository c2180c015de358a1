"""Five hundred requests whose clients leave at random moments: every block, lease and charge comes back."""

import asyncio
import random
from pathlib import Path

import httpx
import pytest
from clients import questions
from pair import Pair, pair
from run import SLOW_SIM

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

REQUESTS, AT_ONCE = 500, 50


async def leave(running: Pair, http: httpx.AsyncClient, rng: random.Random, turn: asyncio.Semaphore) -> bool:
    """True if the client left before the end."""
    question = rng.choice(questions(3, 40, is_seeded=True))
    body = question.body(running.stack.model, stream=rng.random() < 0.7, ignore_eos=True)
    async with turn:
        try:
            async with asyncio.timeout(rng.expovariate(0.7)):
                reply = await http.post(f"{rng.choice(running.urls)}/v1/completions", json=body)
        except TimeoutError:
            return True
    assert reply.status_code in (200, 429)
    return False


async def test_a_storm_of_aborts_leaks_nothing(tmp_path: Path) -> None:
    engines = ("--engine", "sim", "--prefill", "2", "--decode", "2")
    async with pair(tmp_path, *engines, environ=SLOW_SIM) as running:
        rng, turn = random.Random(5), asyncio.Semaphore(AT_ONCE)
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False) as http:
            left = await asyncio.gather(*(leave(running, http, rng, turn) for _ in range(REQUESTS)))
        leaks = await running.quiet()
        await asyncio.sleep(1)
        print(f"\n{sum(left)} of {REQUESTS} left; {dict(running.seen)}")
        assert sum(left) > REQUESTS / 2
        assert not leaks
