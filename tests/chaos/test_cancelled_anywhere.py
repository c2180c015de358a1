"""A client leaves between any two passes of the event loop: nothing is held afterwards, and who stays is answered.

One request is cancelled after so many passes, then another one a pass later, until one ends before its time. Beside
each runs a request that stays. All go through a fleet in which something goes wrong in a certain way.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import virtual_loop
from fleet import MODEL, REQUEST_TIMEOUT_S, SETTINGS, FleetChaos, Scenario, expected
from opentelemetry.trace import NoOpTracer
from sim_worker import Pulls, SimWorker
from virtual_loop import VirtualLoop

from omni_common.errors import Unavailable
from omni_proxy.choice import Choice, Piece, TextRules
from omni_proxy.feed import End, Feed
from omni_proxy.generation import Generation
from omni_proxy.hedging import HedgingSettings
from omni_proxy.openai_requests import Options
from omni_proxy.ports import Submission
from omni_proxy.sampling import Sampling
from omni_proxy.tracing import RequestTrace

HEDGING = HedgingSettings.model_validate(
    {"enabled": True, "budget_ratio": 1.0, "min_wait_ms": 5, "first_ratio": 1.2, "min_seen": 10**9}
)
GREEDY = Sampling(6, temperature=0.0)
SEEDED = Sampling(6, temperature=1.0, seed=5)
SOON_S = 3.0
assert SETTINGS.lease_s > SOON_S, "no lease may end by itself"


class Numbers:
    """Text is the tokens' numbers."""

    def detokenizer(self, **_: object) -> "Numbers":
        return self

    def push(self, tokens: Any) -> str:
        return "".join(f"{token} " for token in tokens)

    def flush(self) -> str:
        return ""


class Client:
    """Asks for `n` choices, and compares what comes with what must."""

    def __init__(self, chaos: FleetChaos, number: int, sampling: Sampling, n: int) -> None:
        rng = random.Random(number)
        # Some prompts fill their last block, some are computed whole, some go on from another's first blocks.
        self._prompt = [rng.randrange(1000) for _ in range((70, 64, 200)[number % 3])]
        self._sampling, self._n = sampling, n
        options = Options(MODEL, n, True, False, False, True, TextRules(), sampling, None, "")
        trace = RequestTrace(NoOpTracer(), {})
        self.generation = Generation(
            chaos.scheduler, cast(Any, Numbers()), options, [self._prompt], [sampling.max_tokens], f"r{number}",
            REQUEST_TIMEOUT_S, trace,
        )  # fmt: skip
        self._texts = [""] * n
        if number % 2:
            for choice in self.generation.choices:
                choice.outlet = SimpleNamespace(is_open=True, show=lambda text, i=choice.index: self._show(i, text))

    async def ask(self) -> None:
        await self.generation.run(self._piece)
        for i, text in enumerate(self._texts):
            seed = self._sampling.seed
            tokens, finish = expected(self._prompt, replace(self._sampling, seed=None if seed is None else seed + i))
            shown = tokens[:-1] if finish == "stop" else tokens
            assert ([int(token) for token in text.split()], self.generation.choices[i].finish_reason) == (shown, finish)

    async def _piece(self, choice: Choice, piece: Piece) -> None:
        self._show(choice.index, piece.text)
        await asyncio.sleep(0.001)  # it reads slowly, and may leave meanwhile

    def _show(self, index: int, text: str) -> None:
        self._texts[index] += text


@asynccontextmanager
async def small_fleet() -> AsyncIterator[FleetChaos]:
    """Two prefill and two decode workers."""
    chaos = FleetChaos(Scenario(workers=4))
    for worker in chaos.workers:
        await worker.start()
    with patch("omni_engine.sim.engine.open_pull", Pulls(chaos.workers).open):
        yield chaos
    for worker in chaos.workers:
        await worker.close()


class Rounds:
    """Of one fleet."""

    def __init__(self, chaos: FleetChaos, sampling: Sampling, n: int, fault: "Fault") -> None:
        self._loop = cast(VirtualLoop, asyncio.get_running_loop())
        self._chaos, self._sampling, self._n, self._fault = chaos, sampling, n, fault
        self._numbers = iter(range(10**6))
        self.seen: Counter[str] = Counter()

    async def run(self, soon_s: float) -> None:
        for _ in range(6):
            await self._client().ask()
        self._chaos.scheduler.hedging.settings = HEDGING
        await self._until_quiet(soon_s)
        tasks, passes = len(asyncio.all_tasks()), 0
        while await self._leave_after(passes):
            await self._until_quiet(soon_s)
            assert len(asyncio.all_tasks()) == tasks, "a task is left"
            passes += self._n

    async def _leave_after(self, passes: int) -> bool:
        """Whether one client left before it had its answer."""
        clients = self._client(), self._client()
        with self._fault(self._chaos.workers):
            leaves, stays = [asyncio.ensure_future(client.ask()) for client in clients]
            self._loop.after_passes(passes, leaves.cancel)
            await asyncio.wait((leaves, stays))
            self._loop.after_passes(-1, leaves.cancel)
        stays.result()
        self.seen["left"] += leaves.cancelled()
        for choice in (choice for client in clients for choice in client.generation.choices):
            record = choice.run.record
            self.seen.update(hedged=record.is_hedged, retries=record.retries, resumes=record.resumes)
            self.seen.update(fell_back=record.fell_back, pulled=record.transfer_ms > 0 and not record.fell_back)
        if not leaves.cancelled():
            leaves.result()
        return leaves.cancelled()

    def _client(self) -> Client:
        return Client(self._chaos, next(self._numbers), self._sampling, self._n)

    async def _until_quiet(self, soon_s: float) -> None:
        end = self._loop.time() + soon_s
        while held := self._chaos._held():
            assert self._loop.time() < end, held
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.1)


Fault = Callable[[list[SimWorker]], Any]


@contextmanager
def none(workers: list[SimWorker]) -> Iterator[None]:
    yield


@contextmanager
def slow_prefill(workers: list[SimWorker]) -> Iterator[None]:
    engine = workers[0].engine
    assert engine is not None
    with patch.object(engine.faults, "slow_factor", 8.0):
        yield


@contextmanager
def failing_prefill(workers: list[SimWorker]) -> Iterator[None]:
    with ExitStack() as stack:
        for worker in workers[:2]:
            assert worker.engine is not None
            stack.enter_context(patch.object(worker.engine.faults, "fail_next_prefills", 1))
        yield


@contextmanager
def failing_pulls(workers: list[SimWorker]) -> Iterator[None]:
    with ExitStack() as stack:
        for worker in workers[2:]:
            assert worker.engine is not None
            stack.enter_context(patch.object(worker.engine.faults, "fail_pulls", 1.0))
        yield


@contextmanager
def breaking_sessions(workers: list[SimWorker]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    timers = [loop.call_later(s, w.break_session, "session_broken") for s in (0.07, 0.13, 0.2) for w in workers[2:]]
    yield
    for timer in timers:
        timer.cancel()


@contextmanager
def stopped_decode(workers: list[SimWorker]) -> Iterator[None]:
    timer = asyncio.get_running_loop().call_later(0.1, workers[2].stop)
    yield
    timer.cancel()
    workers[2].go_on()


@contextmanager
def unsent(workers: list[SimWorker]) -> Iterator[None]:
    """The session breaks before the first sequences for it have left the proxy."""
    loop, left = asyncio.get_running_loop(), [2]

    def lost(worker: SimWorker, submit: Callable[[Submission], Feed], submission: Submission) -> Feed:
        if not left[0]:
            return submit(submission)
        left[0] -= 1
        feed = Feed(0)
        feed.is_unsent = True
        broken = End(error=Unavailable("the session with the decode worker broke", reason="session_broken"))
        loop.call_later(0.01, feed.finish, broken)
        return feed

    with ExitStack() as stack:
        for worker in workers[2:]:
            submit = worker.submit
            stack.enter_context(
                patch.object(worker, "submit", lambda s, worker=worker, submit=submit: lost(worker, submit, s))
            )
        yield


@pytest.mark.parametrize(
    ("sampling", "n", "fault", "soon_s", "must_happen"),
    [
        pytest.param(GREEDY, 1, none, SOON_S, "pulled", id="well"),
        pytest.param(SEEDED, 3, none, SOON_S, "pulled", id="three choices"),
        pytest.param(GREEDY, 1, slow_prefill, SOON_S, "hedged", id="hedged"),
        pytest.param(SEEDED, 2, failing_prefill, SOON_S, "retries", id="prefill fails"),
        pytest.param(GREEDY, 1, failing_pulls, SETTINGS.lease_s + SOON_S, "fell_back", id="pulls fail"),
        pytest.param(GREEDY, 2, breaking_sessions, SOON_S, "resumes", id="sessions break"),
        pytest.param(SEEDED, 1, breaking_sessions, SOON_S, "resumes", id="sessions break under a replay"),
        pytest.param(GREEDY, 1, stopped_decode, SOON_S, "resumes", id="decode stops"),
        pytest.param(GREEDY, 1, unsent, SOON_S, "pulled", id="sessions break before they are told"),
    ],
)
def test_who_leaves_at_any_moment_leaves_nothing(
    sampling: Sampling, n: int, fault: Fault, soon_s: float, must_happen: str
) -> None:
    async def rounds() -> Counter[str]:
        async with small_fleet() as chaos:
            run = Rounds(chaos, sampling, n, fault)
            await run.run(soon_s)
            return run.seen

    seen = virtual_loop.run(rounds())
    print(seen)
    assert seen["left"] > 15
    assert seen[must_happen]


def test_who_leaves_early_makes_nobody_look_late() -> None:
    """How long prefills take is learnt from those that ended, or that a hedge outran."""
    learning = {"first_ratio": 1000, "min_seen": 16, "quantile": 0.5, "min_wait_ms": 1, "budget_ratio": 1.0}

    async def is_hedged() -> bool:
        async with small_fleet() as chaos:
            chaos.scheduler.hedging.settings = HedgingSettings.model_validate({"enabled": True, **learning})
            for number in range(32):
                left = asyncio.ensure_future(Client(chaos, number, GREEDY, 1).ask())
                await asyncio.wait({left}, timeout=0.005)
                left.cancel()
                await asyncio.wait({left})
            stays = Client(chaos, 32, GREEDY, 1)
            await stays.ask()
            return stays.generation.choices[0].run.record.is_hedged

    assert not virtual_loop.run(is_hedged())
