"""Experts move under load on a real engine of two ranks: the load is evened, answers stay, crashes leave no ruin."""

import contextlib
import itertools
import os
import re
import signal
import statistics
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
import pytest
from live import LiveStack, eventually, live_stack

from omni.placement.v1 import placement_service_pb2 as pb
from omni.placement.v1.placement_service_pb2_grpc import PlacementServiceStub

pytestmark = [pytest.mark.engine, pytest.mark.stack, pytest.mark.timeout(600)]

RANKS, SPARE = 2, 4
WORKER = "both-0"
WINDOW_S = 2.0
# The service plans when it is asked to, not on its own.
ENVIRON = {
    "OMNI_DECODE_LOAD_INTERVAL_S": str(WINDOW_S),
    "OMNI_PLACEMENT_REBALANCE_INTERVAL_S": "0",
    "OMNI_PLACEMENT_FORECAST__INTERVAL_S": str(WINDOW_S),
}
ANSWER_TIMEOUT_S = 60.0
CATCH_UP_TIMEOUT_S = 120.0
RELOAD_TIMEOUT_S = 300.0
# Log-probabilities of one token in batches of different size differ by this much at most in bfloat16.
NOISE = 0.2
# One topic over and over keeps a few experts busy.
TOPIC = "Once upon a time there was a little girl called Lily."
PROMPTS = [f"{TOPIC} She was {age} years old." for age in range(3, 5)]
SKEWED = [f"{prompt} {TOPIC * 5}" for prompt in PROMPTS]


@contextmanager
def few_cores() -> Iterator[None]:
    """One core for each rank and one for the rest, for what is started within.

    With two cores a rank, threads wait for each other in every layer; where cores are shared, that takes milliseconds.
    """
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[-(RANKS + 1) :])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    arguments = ("--prefill", "0", "--decode", "0", "--both", "1", "--kv-cache-gib", "0.1", "--max-model-len", "2048")
    experts = ("--expert-ranks", str(RANKS), "--spare-experts", str(SPARE))
    with ExitStack() as stopped:
        with few_cores():
            home = tmp_path_factory.mktemp("experts")
            running = stopped.enter_context(live_stack(home, *arguments, *experts, environ=ENVIRON))
        yield running


def answer(stack: LiveStack, prompt: str, max_tokens: int) -> tuple[list[str], list[float]]:
    """Tokens and their log-probabilities. Shorter than a block, so nothing of it is taken from a cache."""
    body = {
        "model": stack.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        "logprobs": 1,
    }  # fmt: skip
    reply = httpx.post(f"{stack.url}/v1/completions", json=body, timeout=ANSWER_TIMEOUT_S)
    assert reply.status_code == 200, reply.text
    logprobs = reply.json()["choices"][0]["logprobs"]
    return logprobs["tokens"], logprobs["token_logprobs"]


def answers(stack: LiveStack) -> list[tuple[list[str], list[float]]]:
    return [answer(stack, prompt, 8) for prompt in PROMPTS]


def assert_same(before: Any, after: Any) -> None:
    """Up to the first token that differs, which must have been a near tie."""
    for (old_tokens, old_values), (new_tokens, new_values) in zip(before, after, strict=True):
        for old, new, old_value, new_value in zip(old_tokens, new_tokens, old_values, new_values, strict=True):
            assert abs(old_value - new_value) < NOISE
            if old != new:
                break


@contextmanager
def load(stack: LiveStack) -> Iterator[Counter[str]]:
    """Skewed prompts, one after the other, until the block is left; what became of each is counted."""
    outcomes: Counter[str] = Counter()
    stop = threading.Event()

    def client() -> None:
        for prompt in itertools.cycle(SKEWED):
            if stop.is_set():
                return
            try:
                answer(stack, prompt, 4)
                outcomes["complete"] += 1
            except (AssertionError, httpx.HTTPError) as error:
                outcomes[f"{type(error).__name__}: {str(error)[:200]}"] += 1

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(client)
        try:
            yield outcomes
        finally:
            stop.set()
            asking.result()


def metric(stack: LiveStack, name: str) -> float:
    """A value that the worker shows; of one with labels the sum."""
    record = stack.processes()[WORKER]
    text = httpx.get(f"http://127.0.0.1:{record['metrics_port']}/metrics", timeout=5).text
    values = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, values))


def total(stack: LiveStack, what: str) -> float:
    return metric(stack, f"omni_worker_expert_{what}_total")


def imbalance(stack: LiveStack, windows: int = 1) -> float:
    """Slowest over mean rank, the median of so many windows to come, the first of which has begun."""
    seen: list[float] = []
    for _ in range(windows + 1):
        reports = total(stack, "load_reports")
        eventually("a window is reported", lambda told=reports: total(stack, "load_reports") > told, CATCH_UP_TIMEOUT_S)
        seen.append(metric(stack, "omni_worker_expert_rank_imbalance_ratio"))
    return statistics.median(seen[1:])


@contextmanager
def placement(stack: LiveStack) -> Iterator[tuple[Any, dict[str, str]]]:
    """The service's stub, and the names of the one group it knows."""
    with grpc.insecure_channel(stack.processes()["placement"]["address"]) as channel:
        stub = PlacementServiceStub(channel)  # type: ignore[no-untyped-call]
        yield stub, {"model": stack.model, "group": f"{stack.name}-{WORKER}"}


def layout_in_force(stack: LiveStack) -> Any:
    with placement(stack) as (stub, names):
        return stub.GetLayout(pb.GetLayoutRequest(**names), timeout=10).layout


def publish(stack: LiveStack, **plan: Any) -> int:
    """Put a layout in force once no migration is under way. Returns its version, of which nothing is applied yet."""

    def published() -> int:
        with placement(stack) as (stub, names), contextlib.suppress(grpc.RpcError):
            planned = stub.Plan(pb.PlanRequest(**names, **plan, publish=True), timeout=30)
            return int(planned.layout.layout_version)
        return 0

    version: int = eventually("a layout is published", published, CATCH_UP_TIMEOUT_S)
    return version


def follows(stack: LiveStack) -> bool:
    """The engine holds what the service has in force."""
    try:
        version = layout_in_force(stack).layout_version
    except grpc.RpcError:
        return False
    return bool(version and metric(stack, "omni_worker_expert_layout_version") == version)


def busiest_together(stack: LiveStack) -> list[pb.Pin]:
    """The busier half of each layer's experts on the first rank: a layout made for other traffic may be as bad."""
    with placement(stack) as (stub, names):
        forecast = np.array(stub.GetLoad(pb.GetLoadRequest(**names), timeout=10).forecast)
        shape = stub.GetLayout(pb.GetLayoutRequest(**names), timeout=10).layout.topology
    busiest = np.argsort(-forecast.reshape(shape.num_layers, shape.num_experts), axis=1)
    return [
        pb.Pin(layer=layer, expert=int(expert), rank=0)
        for layer, row in enumerate(busiest)
        for expert in row[: shape.num_experts // RANKS]
    ]


def test_skewed_load_is_evened_and_nobody_notices(stack: LiveStack) -> None:
    before = answers(stack)
    with load(stack) as outcomes:
        as_loaded = imbalance(stack)
        publish(stack, pins=busiest_together(stack), budget=0)
        eventually("the bad layout is applied", lambda: follows(stack), CATCH_UP_TIMEOUT_S)
        skewed, between = imbalance(stack), answers(stack)
        publish(stack)
        eventually("the good layout is applied", lambda: follows(stack), CATCH_UP_TIMEOUT_S)
        evened = imbalance(stack)
    print(
        f"slowest / mean rank: as loaded {as_loaded:.3f}, skewed {skewed:.3f}, evened {evened:.3f}; "
        f"{total(stack, 'moves'):.0f} moves in {total(stack, 'rounds'):.0f} rounds beside "
        f"{outcomes['complete']} requests"
    )
    assert set(outcomes) == {"complete"}
    assert evened < skewed - 0.2
    assert_same(before, between)
    assert_same(before, answers(stack))


def test_the_placement_service_dies_in_the_middle_of_a_migration(stack: LiveStack) -> None:
    before = answers(stack)
    with load(stack) as outcomes:
        with stack.stopped(WORKER):
            version = publish(stack, solver="round_robin")
            stack.kill("placement")
        while_gone = answers(stack)
        eventually("the migration is brought to its end", lambda: follows(stack), CATCH_UP_TIMEOUT_S)
    assert layout_in_force(stack).layout_version >= version
    assert set(outcomes) == {"complete"}
    assert_same(before, while_gone)
    assert_same(before, answers(stack))


def test_a_rank_dies_in_the_middle_of_a_migration(stack: LiveStack) -> None:
    """The engine ends with it and is loaded anew; it then holds the first layout and is led to the one in force."""
    before = answers(stack)
    rounds, engine = total(stack, "rounds"), stack.pid(WORKER)
    version = publish(stack, solver="identity")
    eventually("the first round is done", lambda: total(stack, "rounds") > rounds, CATCH_UP_TIMEOUT_S)
    os.kill(rank_process(engine), signal.SIGKILL)
    eventually("the worker is another process", lambda: stack.pid(WORKER) != engine, RELOAD_TIMEOUT_S)
    eventually("the worker serves again", lambda: stack.is_serving(WORKER), RELOAD_TIMEOUT_S)
    eventually("the engine holds the layout in force", lambda: follows(stack), CATCH_UP_TIMEOUT_S)
    assert layout_in_force(stack).layout_version >= version
    assert_same(before, answers(stack))


def rank_process(pid: int) -> int:
    """The last rank's process: one that no other of the engine's processes comes from, on the last of its cores."""
    family = psutil.Process(pid).children(recursive=True)
    ranks = [child for child in family if "Worker" in " ".join(child.cmdline())]
    assert len(ranks) == RANKS, [child.cmdline() for child in family]
    return max(ranks, key=lambda rank: rank.create_time()).pid
