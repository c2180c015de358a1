"""Whose work a worker has: told to every proxy as the others' work, and nothing is left when all has ended."""

import asyncio
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from decode_client import session

from omni.engine.v1 import engine_pb2
from omni.engine.v1.worker_service_pb2 import WatchStatsRequest
from omni.prefill.v1.prefill_service_pb2 import PrefillRequest
from omni_engine.hosting.accounts import Account, Accounts

PROMPT = list(range(100, 170))
PROXIES = ("a", "b", "")


def prefill(worker, proxy_id, name="p", token_ids=PROMPT, **fields):
    sampling = engine_pb2.Sampling(max_tokens=4, ignore_eos=True)
    request = PrefillRequest(
        request_id=name, model="sim", token_ids=token_ids, sampling=sampling, proxy_id=proxy_id, **fields
    )
    return worker.prefill.Prefill(request, timeout=20)


def others(worker, proxy_id):
    load = worker.host.worker.load(proxy_id)
    return load.others_prefills, load.others_uncached_tokens, load.others_sequences


@given(
    work=st.lists(
        st.tuples(st.sampled_from(PROXIES), st.booleans(), st.integers(0, 10_000), st.booleans()), max_size=30
    ),
    order=st.randoms(use_true_random=False),
)
def test_accounts_are_exact_and_end_empty(work, order):
    accounts, live = Accounts(), []
    for proxy_id, is_prefill, tokens, is_computed in work:
        share = accounts.prefill(proxy_id, tokens) if is_prefill else accounts.sequence(proxy_id, tokens)
        live.append((proxy_id, is_prefill, 0 if is_computed else tokens, share))
        if is_computed:
            share.computed(tokens)
            share.computed(tokens)
    order.shuffle(live)
    while live:
        for asking in PROXIES:
            rest = [entry for entry in live if asking and entry[0] != asking]
            prefills = sum(is_prefill for _, is_prefill, _, _ in rest)
            expected = Account(prefills, len(rest) - prefills, sum(tokens for _, _, tokens, _ in rest))
            assert accounts.others(asking) == expected
        share = live.pop()[-1]
        share.close()
        share.computed(1)
        share.close()
    assert accounts.all == Account()
    assert len(accounts) == 0
    done = [tokens for _, _, tokens, is_computed in work if is_computed]
    assert (accounts.computed.prompts, accounts.computed.tokens) == (len(done), sum(done))


def test_prompts_are_timed_while_some_are_on_their_way():
    now_s = 10.0
    accounts = Accounts(lambda: now_s)

    def seen():
        computed = accounts.computed
        return computed.prompts, computed.tokens, computed.busy_s

    with accounts.prefill("a", 100) as first, accounts.sequence("b", 1, pulls=True) as pulling:
        now_s += 2.0
        second = accounts.sequence("b", 50)
        pulling.computed(0)
        now_s += 1.0
        first.computed(90)
        assert seen() == (1, 90, 3.0)
        now_s += 4.0
        second.close()
    assert seen() == (1, 90, 7.0), "its time was the worker's, and what it computed is not known"
    now_s += 100.0
    with accounts.prefill("a", 10) as third:
        now_s += 0.5
        third.computed(10)
    assert seen() == (2, 100, 7.5), "an idle worker takes no time"


async def test_what_prompts_took_is_told_to_everybody(hosted):
    async with hosted(sim={"faults": {"slow_factor": 5}}) as worker, session(worker, "a") as client:
        answers = [
            await prefill(worker, "a", "p", list(range(200))),
            await prefill(worker, "b", "q", list(range(300, 500))),
        ]
        load = worker.host.worker.load("new")
        assert (load.prompts, load.prompt_tokens) == (2, 400)
        assert load.prompt_busy_ms >= sum(answer.timings.compute_ms for answer in answers)
        await client.submit(1, max_tokens=4)
        await client.until_finished(1)
        load = worker.host.worker.load("new")
        assert (load.prompts, load.prompt_tokens) == (3, 400 + len(PROMPT))
        cached = await prefill(worker, "a", "r", list(range(200)))
        assert worker.host.worker.load("new").prompt_tokens == load.prompt_tokens + 200 - cached.cached_tokens


async def test_a_prompt_counts_as_believed_until_it_is_answered(hosted, until):
    async with hosted(sim={"faults": {"slow_factor": 20}}) as worker:
        calls = [prefill(worker, "a", "p"), prefill(worker, "a", "q", range(70, 200), uncached_tokens=18)]
        await until(lambda: worker.host.admission.active == 2)
        assert others(worker, "a") == (0, 0, 0)
        assert others(worker, "b") == (2, 88, 0)
        assert others(worker, "") == (0, 0, 0)
        calls.append(prefill(worker, "", "r", uncached_tokens=1_000))
        await until(lambda: worker.host.admission.active == 3)
        assert others(worker, "a") == (1, 70, 0)
        for call in calls:
            await call
        assert others(worker, "b") == (0, 0, 0)


async def test_a_sequence_counts_its_prompt_until_the_first_token(hosted, until):
    async with hosted(sim={"faults": {"slow_factor": 5}}) as worker, session(worker, "a") as client:
        await client.submit(1, max_tokens=20, uncached_tokens=30)
        await until(lambda: worker.host.admission.active)
        assert others(worker, "b") == (0, 30, 1)
        while not client.tokens:
            await client.read()
        assert others(worker, "b") == (0, 0, 1)
        assert others(worker, "a") == (0, 0, 0)
        await client.until_finished(1)
        assert others(worker, "b") == (0, 0, 0)


async def test_queued_tokens_leave_out_what_is_believed_cached(hosted, until):
    settings = {"max_num_seqs": 1, "faults": {"slow_factor": 50}}
    async with hosted(sim=settings) as worker:
        first = prefill(worker, "a", "p")
        await until(lambda: worker.engine.stats().running)
        waiting = prefill(worker, "a", "q", uncached_tokens=6)
        await until(lambda: worker.engine.stats().waiting)
        assert worker.engine.stats().queued_tokens == len(PROMPT) + 6
        await first
        answer = await waiting
        assert answer.cached_tokens == 64


async def test_the_stream_tells_each_proxy_the_others_work(hosted, until):
    async with hosted(sim={"faults": {"slow_factor": 20}}) as worker, asyncio.timeout(20):
        watches = {
            name: worker.worker.WatchStats(WatchStatsRequest(min_interval_ms=10, proxy_id=name)) for name in "ab"
        }
        call = prefill(worker, "a")
        while (await watches["b"].read()).others_uncached_tokens != len(PROMPT):
            pass
        assert (await watches["a"].read()).others_prefills == 0
        await call
        while (await watches["b"].read()).others_prefills:
            pass
        for watch in watches.values():
            watch.cancel()


async def test_steps_and_their_time_grow_together(hosted):
    async with hosted() as worker, session(worker) as client:
        await client.submit(1, max_tokens=40)
        while len(client.tokens.get(1, ())) < 20:
            await client.read()
        midway = worker.host.worker.load()
        assert midway.context_tokens >= len(PROMPT) + 20
        await client.until_finished(1)
        load = worker.host.worker.load()
        assert (load.steps, load.context_tokens) == (40, 0)
        assert load.busy_ms / load.steps == pytest.approx(load.step_ms, rel=0.5)
        assert load.busy_ms > midway.busy_ms


@pytest.mark.parametrize("seed", range(6))
async def test_any_order_of_ends_leaves_nothing(hosted, seed):
    """Prefills and sequences of two proxies that end by themselves, by abort, by the session's end or the engine's."""
    rng = random.Random(seed)
    sim = {"max_num_seqs": 8, "lease_s": 0.1, "faults": {"slow_factor": 0.5}}
    async with hosted(sim=sim) as worker, session(worker, "a") as one, session(worker, "b") as two:
        calls = []
        for number in range(60):
            client = rng.choice((one, two))
            match rng.randrange(6):
                case 0 | 1:
                    tokens = [number, *PROMPT[: rng.randrange(70)]]
                    calls.append(prefill(worker, rng.choice(PROXIES), f"p{number}", tokens))
                case 2 | 3:
                    await client.submit(number, max_tokens=rng.randrange(1, 400), deadline_ms=rng.choice((0, 30)))
                case 4:
                    await client.send(abort={"stream_ids": [rng.randrange(number + 1)]})
                case 5 if calls:
                    calls.pop(rng.randrange(len(calls))).cancel()
            if rng.random() < 0.3:
                await asyncio.sleep(0.005)
        two.call.cancel()
        if seed % 2:
            worker.engine.die("gone")
        else:
            for call in calls[::2]:
                call.cancel()
            one.call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await worker.idle()
        assert worker.host.accounts.all == Account()
        assert len(worker.host.accounts) == 0
        stats = worker.engine.stats()
        assert (stats.queued_tokens, stats.context_tokens, stats.running, stats.waiting) == (0, 0, 0, 0)
