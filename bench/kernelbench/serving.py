"""Tokens per second of two engines on the same cores, one with Omni's kernels and one without, taken in turn."""

import asyncio
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from omni_engine.ports import DecodeJob, SamplingParams
from omni_engine.vllm import VllmEngine
from omni_engine.vllm_settings import VllmSettings

_START_S, _ROUND_S = 600.0, 300.0
PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Ratio:
    """Tokens per second with and without, and the median of the ratios of neighbouring rounds."""

    batch: int
    omni_tok_s: float
    vllm_tok_s: float
    ratio: float


class _Side:
    def __init__(self, settings: VllmSettings, model_dir: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, settings, model_dir))
        self._process.start()

    def receive(self, timeout_s: float) -> Any:
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"an engine did not answer within {timeout_s:.0f} s")
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def round(self, batch: int, tokens: int) -> float:
        self._pipe.send((batch, tokens))
        rate: float = self.receive(_ROUND_S)
        return rate

    def calls(self) -> Any:
        self._pipe.send("calls")
        return self.receive(_ROUND_S)

    def close(self) -> None:
        if self._process.is_alive():
            self._pipe.send(None)
            self._process.join(30)
        self._process.kill()


def compare(
    settings: VllmSettings,
    kernels: str,
    model_dir: Path,
    batches: Sequence[int],
    rounds: int,
    tokens: int,
    report: Callable[[Ratio], None],
) -> tuple[list[Ratio], Any]:
    """The ratio at every batch size, reported as it is known, and what the engine with Omni's kernels ran on them."""
    ratios = []
    with _sides(settings, kernels, model_dir) as (omni, vllm):
        for batch in batches:
            ratios.append(_ratio(omni, vllm, batch, rounds, tokens))
            report(ratios[-1])
        return ratios, omni.calls()


def _ratio(omni: _Side, vllm: _Side, batch: int, rounds: int, tokens: int) -> Ratio:
    pairs = []
    for number in range(rounds + 1):
        first, second = (omni, vllm) if number % 2 else (vllm, omni)
        rates = {first: first.round(batch, tokens), second: second.round(batch, tokens)}
        pairs.append((rates[omni], rates[vllm]))
    kept = pairs[1:]
    return Ratio(
        batch,
        statistics.median(with_ for with_, _ in kept),
        statistics.median(without for _, without in kept),
        statistics.median(with_ / without for with_, without in kept),
    )


@contextmanager
def _sides(settings: VllmSettings, kernels: str, model_dir: Path) -> Iterator[tuple[_Side, _Side]]:
    sides: list[_Side] = []
    try:
        for chosen in (kernels, "vllm"):
            platform = settings.platform if chosen != "vllm" else "cpu"
            side = settings.model_copy(update={"kernels": chosen, "platform": platform})
            sides.append(_Side(side, model_dir))
            sides[-1].receive(_START_S)
        yield sides[0], sides[1]
    finally:
        for side_ in sides:
            side_.close()


def _serve(pipe: Connection, settings: VllmSettings, model_dir: Path) -> None:
    asyncio.run(_answer(pipe, settings, model_dir))


async def _answer(pipe: Connection, settings: VllmSettings, model_dir: Path) -> None:
    engine = VllmEngine(settings, model_dir, model_dir.name, "both")
    try:
        await engine.start()
        pipe.send("started")
        rng = random.Random(0)
        while (asked := await asyncio.to_thread(pipe.recv)) is not None:
            pipe.send(await engine.kernel_calls() if asked == "calls" else await _round(engine, rng, *asked))
    except Exception as error:
        pipe.send(error)
    finally:
        await engine.close()


async def _round(engine: VllmEngine, rng: random.Random, batch: int, tokens: int) -> float:
    """Generated tokens per second of `batch` sequences that start together; prompts are new each time."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    jobs = [
        DecodeJob(f"{rng.random()}", [rng.randrange(300, 900) for _ in range(PROMPT_TOKENS)], params)
        for _ in range(batch)
    ]
    left, ended = batch, asyncio.Event()

    def sink(outputs: list[Any]) -> None:
        nonlocal left
        left -= sum(output.finish_reason is not None for output in outputs)
        if not left:
            ended.set()

    began = time.perf_counter()
    for job in jobs:
        await engine.submit(job, sink)
    await ended.wait()
    return batch * tokens / (time.perf_counter() - began)
